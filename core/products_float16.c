#define KIND FLOAT16
#include "products_rows.h"

const Products products_float16 = PRODUCTS;
