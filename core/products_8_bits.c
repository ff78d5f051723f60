#define BITS 8
#include "products_panels.h"

const Products products_8_bits[] = PRODUCTS;
