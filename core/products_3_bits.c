#define BITS 3
#include "products_panels.h"

const Products products_3_bits[] = PRODUCTS;
