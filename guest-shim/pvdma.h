/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of the Linux module share. Address conventions as in
 * pvdma_core.h; `below' is the address that the layer under us gives for memory:
 * the physical address where there is none.
 */
#ifndef PVDMA_H
#define PVDMA_H

#include <linux/device.h>
#include <linux/percpu.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "pvdma_compat.h"
#include "pvdma_core.h"
#include "pvdma_lazy.h"

/* One number of a device in debugfs. */
struct pvdma_stat {
	struct pvdma_device *p;
	unsigned int index;
};

#define PVDMA_STATS	22

/*
 * An assigned device. They stand in one array, each with its operations first: no lock
 * and no lookup on the way of a map, and a pointer to ops that are not ours is
 * recognised instead of believed.
 */
struct pvdma_device {
	struct dma_map_ops ops;		/* in dev->dma_ops while installed */
	const struct dma_map_ops *lower;	/* what was there; NULL: direct map */
	struct device *dev;		/* NULL: the slot is free */
	u32 handle;
	u32 policy;
	bool identity;
	bool installed;			/* and holds a reference to the module */
	u32 list_entries;		/* entries of one map_list; 1: no lists */
	bool lost;			/* the host no longer has it, and it is removed */
	bool unclean;			/* the host may hold mappings of before */
	s64 stale;			/* of what is outstanding: of earlier drivers */
	u64 iova_last;			/* last address the host's IOMMU translates */
	u64 mapping_max;		/* longest mapping drivers should make, bytes */
	struct pvdma_table table;	/* with policy cached */
	struct pvdma_lazy *lazy;	/* with policy lazy, over the direct map */
	struct pvdma_lazy *lazy_memory;	/* for it, whoever has the slot */
	raw_spinlock_t lazy_lock;	/* of it, and of lazy_due */
	bool lazy_due;			/* lazy_flush is on its way */
	struct delayed_work lazy_flush;
	struct pvdma_counters __percpu *counters;
	struct xarray below;		/* iova page to page below, if lower */
	struct xarray memory;		/* what drivers have of ours: page to era */
	unsigned long era;		/* of what is mapped; a release ends it */
	bool removed;			/* from the bus, but its memory is not back */
	struct work_struct settle;
	struct dentry *dir;
	struct pvdma_stat stats[PVDMA_STATS];
};

extern struct pvdma_host pvdma_host;
extern u64 pvdma_first_iova;
extern struct pvdma_device pvdma_devices[PVDMA_DEVICES_MAX];
DECLARE_PER_CPU(struct pvdma_entry *, pvdma_call_page);
DECLARE_PER_CPU(struct pvdma_counters, pvdma_counters);

/* pvdma_main.c */
struct pvdma_device *pvdma_find(const struct device *dev);
void pvdma_lose(struct pvdma_device *p);
void pvdma_memory_is_back(struct pvdma_device *p);

/* The device whose ops these are; NULL when nobody here knows it. */
static inline struct pvdma_device *pvdma_of(struct device *dev)
{
	unsigned long at = (unsigned long)get_dma_ops(dev);
	unsigned long offset = at - (unsigned long)pvdma_devices;

	BUILD_BUG_ON(offsetof(struct pvdma_device, ops));
	if (likely(offset < sizeof(pvdma_devices)))
		return (struct pvdma_device *)at;
	/* somebody stacked ops over ours and calls down */
	return pvdma_find(dev);
}

/* pvdma_ops.c: ops over the direct map, and the two steps both kinds share */
extern const struct dma_map_ops pvdma_direct_ops;
extern const struct dma_map_ops pvdma_refusing_ops;	/* map nothing */

u32 pvdma_make(struct pvdma_device *p, u64 below, u64 bytes, u64 iova_max,
	       u32 flags, unsigned long attrs, u64 *iova);
u32 pvdma_take(struct pvdma_device *p, u64 iova, u64 bytes);
void pvdma_flush_late(struct work_struct *work);
void pvdma_flush_last(struct pvdma_device *p);
u64 pvdma_streaming_max(const struct pvdma_device *p, struct device *dev);
u64 pvdma_coherent_max(const struct pvdma_device *p, struct device *dev);
u32 pvdma_streaming_flags(const struct pvdma_device *p, struct device *dev,
			  enum dma_data_direction dir);
u32 pvdma_coherent_flags(const struct pvdma_device *p, enum dma_data_direction dir);
int pvdma_errno(u32 status);
struct page *pvdma_get_pages(struct device *dev, size_t size, gfp_t gfp);
void pvdma_put_pages(struct device *dev, struct page *page, size_t size,
		     dma_addr_t iova, bool unreachable);
size_t pvdma_max_mapping_size(struct device *dev);
int pvdma_dma_supported(struct device *dev, u64 mask);
u64 pvdma_get_required_mask(struct device *dev);

/* True when freed memory is out of the device's reach after this status. */
static inline bool pvdma_unreachable(u32 status)
{
	return PVDMA_STATUS_CLASS(status) == PVDMA_STATUS_OK ||
	       PVDMA_STATUS_CLASS(status) == PVDMA_STATUS_GONE;
}

/* pvdma_stack.c: ops over other ops */
bool pvdma_stack_ops(struct dma_map_ops *ops, const struct dma_map_ops *lower);

/* pvdma_stats.c */
void pvdma_stats_init(void);
void pvdma_stats_exit(void);
void pvdma_stats_add(struct pvdma_device *p);
void pvdma_stats_remove(struct pvdma_device *p);
s64 pvdma_outstanding(const struct pvdma_device *p);
s64 pvdma_stuck(const struct pvdma_device *p);
u64 pvdma_outstanding_bytes(const struct pvdma_device *p);
void pvdma_count_left(struct pvdma_device *p, s64 leaked);
void pvdma_count_late(struct pvdma_device *p);
void pvdma_nothing_outstanding(struct pvdma_device *p);

#endif /* PVDMA_H */
