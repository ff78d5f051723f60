#define KIND BFLOAT16
#include "products_rows.h"

const Products products_bfloat16 = PRODUCTS;
