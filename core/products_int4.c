#define KIND INT4
#include "products_panels.h"

const Products products_int4 = PRODUCTS;
