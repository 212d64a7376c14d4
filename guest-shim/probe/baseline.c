// SPDX-License-Identifier: GPL-2.0
/* Compiles whatever the kernel: if not, the other probes mean nothing. */
#include <linux/dma-map-ops.h>

size_t probe(const struct device *dev);
size_t probe(const struct device *dev)
{
	return sizeof(*dev);
}
