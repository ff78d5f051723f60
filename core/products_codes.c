#define BITS 4
#define CODES_OF_4_BITS
#include "products_panels.h"

const Products products_codes[] = PRODUCTS;
