#define KIND INT8_GROUPS
#include "products_rows.h"

const Products products_int8_groups = PRODUCTS;
