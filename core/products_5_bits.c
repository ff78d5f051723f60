#define BITS 5
#include "products_panels.h"

const Products products_5_bits[] = PRODUCTS;
