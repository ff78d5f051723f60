#define BITS 4
#include "products_panels.h"

const Products products_4_bits[] = PRODUCTS;
