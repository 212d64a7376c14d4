// SPDX-License-Identifier: GPL-2.0
/*
 * /sys/kernel/debug/pvdma: a directory per assigned device, a number per file;
 * the calls of all devices at the top. Sums over CPUs that go on counting, so a
 * sum is exact only when the device rests.
 */
#include <linux/debugfs.h>
#include <linux/pci.h>
#include <linux/seq_file.h>

#include "pvdma.h"

static struct dentry *pvdma_dir;

/* One counter over all CPUs; offset is its place in struct pvdma_counters. */
static u64 pvdma_sum(const struct pvdma_counters __percpu *counters, size_t offset)
{
	u64 sum = 0;
	int cpu;

	for_each_possible_cpu(cpu) {
		const void *block = per_cpu_ptr(counters, cpu);

		sum += READ_ONCE(*(const u64 *)(block + offset));
	}
	return sum;
}

#define AT(member)	offsetof(struct pvdma_counters, member)
#define CALL_AT(call)	(AT(calls) + sizeof(u64) * (call))
#define ERROR_AT(class)	(AT(errors) + sizeof(u64) * (class))

/* The counters that are files of their own. */
static const struct {
	const char *name;
	const char *dir;	/* NULL: the device's own */
	size_t offset;
} pvdma_files[PVDMA_STATS] = {
	{ "maps", NULL, AT(maps) },
	{ "unmaps", NULL, AT(unmaps) },
	{ "map_lists", NULL, AT(map_lists) },
	{ "unmap_lists", NULL, AT(unmap_lists) },
	{ "pages_mapped", NULL, AT(pages_mapped) },
	{ "pages_unmapped", NULL, AT(pages_unmapped) },
	{ "retries", NULL, AT(retries) },
	{ "outstanding", NULL, AT(outstanding) },
	{ "retry", "errors", ERROR_AT(PVDMA_STATUS_RETRY) },
	{ "limit", "errors", ERROR_AT(PVDMA_STATUS_LIMIT) },
	{ "invalid", "errors", ERROR_AT(PVDMA_STATUS_INVALID) },
	{ "gone", "errors", ERROR_AT(PVDMA_STATUS_GONE) },
	{ "map", "hypercalls", CALL_AT(PVDMA_CALL_MAP) },
	{ "unmap", "hypercalls", CALL_AT(PVDMA_CALL_UNMAP) },
	{ "map_list", "hypercalls", CALL_AT(PVDMA_CALL_MAP_LIST) },
	{ "unmap_list", "hypercalls", CALL_AT(PVDMA_CALL_UNMAP_LIST) },
};

/* Signed, because an unmap may be counted before its map when read in between. */
s64 pvdma_outstanding(const struct pvdma_device *p)
{
	return pvdma_sum(p->counters, AT(outstanding));
}

u64 pvdma_outstanding_bytes(const struct pvdma_device *p)
{
	s64 pages = pvdma_sum(p->counters, AT(pages_mapped)) -
		    pvdma_sum(p->counters, AT(pages_unmapped));

	return pages > 0 ? (u64)pages << PAGE_SHIFT : 0;
}

static int pvdma_counter_show(struct seq_file *file, void *unused)
{
	const struct pvdma_stat *stat = file->private;

	seq_printf(file, "%lld\n",
		   (s64)pvdma_sum(stat->p->counters, pvdma_files[stat->index].offset));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(pvdma_counter);

static int pvdma_bytes_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "%llu\n", pvdma_outstanding_bytes(file->private));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(pvdma_bytes);

static int pvdma_policy_show(struct seq_file *file, void *unused)
{
	const struct pvdma_device *p = file->private;

	seq_printf(file, "%s\n", pvdma_policy_name(p->policy));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(pvdma_policy);

/* Calls of one kind by anybody since the module was loaded. */
static u64 pvdma_calls(u32 call)
{
	u64 sum = pvdma_sum(&pvdma_counters, CALL_AT(call));
	int i;

	for (i = 0; i < PVDMA_DEVICES_MAX; i++) {
		const struct pvdma_counters __percpu *counters;

		counters = READ_ONCE(pvdma_devices[i].counters);
		if (counters)
			sum += pvdma_sum(counters, CALL_AT(call));
	}
	return sum;
}

static int pvdma_hypercall_map_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "%llu\n", pvdma_calls(PVDMA_CALL_MAP) +
				   pvdma_calls(PVDMA_CALL_MAP_LIST));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(pvdma_hypercall_map);

static int pvdma_hypercall_unmap_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "%llu\n", pvdma_calls(PVDMA_CALL_UNMAP) +
				   pvdma_calls(PVDMA_CALL_UNMAP_LIST));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(pvdma_hypercall_unmap);

static int pvdma_hypercall_pv_dev_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "%llu\n", pvdma_calls(PVDMA_CALL_IS_ASSIGNED));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(pvdma_hypercall_pv_dev);

void pvdma_stats_add(struct pvdma_device *p)
{
	struct dentry *dir = NULL;
	const char *last = NULL;
	unsigned int i;

	p->dir = debugfs_create_dir(dev_name(p->dev), pvdma_dir);
	debugfs_create_u32("handle", 0444, p->dir, &p->handle);
	debugfs_create_file("policy", 0444, p->dir, p, &pvdma_policy_fops);
	debugfs_create_file("outstanding_bytes", 0444, p->dir, p, &pvdma_bytes_fops);
	for (i = 0; i < PVDMA_STATS; i++) {
		const char *name = pvdma_files[i].dir;

		if (name && name != last)
			dir = debugfs_create_dir(name, p->dir);
		last = name;
		p->stats[i].p = p;
		p->stats[i].index = i;
		debugfs_create_file(pvdma_files[i].name, 0444, name ? dir : p->dir,
				    &p->stats[i], &pvdma_counter_fops);
	}
}

/* The device goes, its calls stay in the totals; the counters await another. */
void pvdma_stats_remove(struct pvdma_device *p)
{
	unsigned long irq;
	u32 call;
	int cpu;

	debugfs_remove(p->dir);
	p->dir = NULL;
	local_irq_save(irq);
	for (call = 0; call <= PVDMA_CALL_UNMAP_LIST; call++)
		this_cpu_ptr(&pvdma_counters)->calls[call] +=
			pvdma_sum(p->counters, CALL_AT(call));
	local_irq_restore(irq);
	for_each_possible_cpu(cpu)
		memset(per_cpu_ptr(p->counters, cpu), 0, sizeof(*p->counters));
}

void pvdma_stats_init(void)
{
	pvdma_dir = debugfs_create_dir("pvdma", NULL);
	debugfs_create_file("hypercall_map", 0444, pvdma_dir, NULL,
			    &pvdma_hypercall_map_fops);
	debugfs_create_file("hypercall_unmap", 0444, pvdma_dir, NULL,
			    &pvdma_hypercall_unmap_fops);
	debugfs_create_file("hypercall_pv_dev", 0444, pvdma_dir, NULL,
			    &pvdma_hypercall_pv_dev_fops);
}

void pvdma_stats_exit(void)
{
	debugfs_remove(pvdma_dir);
}
