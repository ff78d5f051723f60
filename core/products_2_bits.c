#define BITS 2
#include "products_panels.h"

const Products products_2_bits[] = PRODUCTS;
