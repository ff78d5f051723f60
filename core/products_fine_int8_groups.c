#define KIND FINE_INT8_GROUPS
#include "products_rows.h"

const Products products_fine_int8_groups = PRODUCTS;
