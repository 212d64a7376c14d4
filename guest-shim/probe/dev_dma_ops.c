// SPDX-License-Identifier: GPL-2.0
/* Can a device have DMA ops? Without, set_dma_ops() does nothing. */
#include <linux/dma-map-ops.h>

const void *probe(const struct device *dev);
const void *probe(const struct device *dev)
{
	return dev->dma_ops;
}
