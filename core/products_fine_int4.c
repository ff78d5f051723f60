#define KIND FINE_INT4
#include "products_panels.h"

const Products products_fine_int4 = PRODUCTS;
