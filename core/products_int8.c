#define KIND INT8
#include "products_rows.h"

const Products products_int8 = PRODUCTS;
