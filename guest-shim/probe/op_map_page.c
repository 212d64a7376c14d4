// SPDX-License-Identifier: GPL-2.0
/* Up to about 6.18: map_page and map_resource. */
#include <linux/dma-map-ops.h>

const void *probe(const struct dma_map_ops *ops);
const void *probe(const struct dma_map_ops *ops)
{
	return ops->map_page;
}
