#define KIND FLOAT32
#include "products_rows.h"

const Products products_float32 = PRODUCTS;
