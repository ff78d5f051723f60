#define BITS 6
#include "products_panels.h"

const Products products_6_bits[] = PRODUCTS;
