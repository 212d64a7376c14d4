// SPDX-License-Identifier: GPL-2.0
/* Up to 6.9: alloc_pages. */
#include <linux/dma-map-ops.h>

const void *probe(const struct dma_map_ops *ops);
const void *probe(const struct dma_map_ops *ops)
{
	return ops->alloc_pages;
}
