#define KIND FINE_INT8
#include "products_rows.h"

const Products products_fine_int8 = PRODUCTS;
