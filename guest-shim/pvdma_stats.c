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
	{ "stuck", NULL, AT(stuck) },
	{ "leaked", NULL, AT(leaked) },
	{ "late", NULL, AT(late) },
	{ "reused", NULL, AT(reused) },
	{ "retry", "errors", ERROR_AT(PVDMA_STATUS_RETRY) },
	{ "limit", "errors", ERROR_AT(PVDMA_STATUS_LIMIT) },
	{ "invalid", "errors", ERROR_AT(PVDMA_STATUS_INVALID) },
	{ "gone", "errors", ERROR_AT(PVDMA_STATUS_GONE) },
	{ "map", "hypercalls", CALL_AT(PVDMA_CALL_MAP) },
	{ "unmap", "hypercalls", CALL_AT(PVDMA_CALL_UNMAP) },
	{ "map_list", "hypercalls", CALL_AT(PVDMA_CALL_MAP_LIST) },
	{ "unmap_list", "hypercalls", CALL_AT(PVDMA_CALL_UNMAP_LIST) },
	{ "release", "hypercalls", CALL_AT(PVDMA_CALL_RELEASE) },
	{ "table", "hypercalls", CALL_AT(PVDMA_CALL_TABLE) },
};

/* Signed, because an unmap may be counted before its map when read in between. */
s64 pvdma_outstanding(const struct pvdma_device *p)
{
	return pvdma_sum(p->counters, AT(outstanding));
}

s64 pvdma_stuck(const struct pvdma_device *p)
{
	return pvdma_sum(p->counters, AT(stuck));
}

u64 pvdma_outstanding_bytes(const struct pvdma_device *p)
{
	s64 pages = pvdma_sum(p->counters, AT(pages_mapped)) -
		    pvdma_sum(p->counters, AT(pages_unmapped)) -
		    pvdma_sum(p->counters, AT(pages_released));

	return pages > 0 ? (u64)pages << PAGE_SHIFT : 0;
}

/* A driver is gone and left this many mappings behind; with the next begins anew what is stuck. */
void pvdma_count_left(struct pvdma_device *p, s64 leaked)
{
	this_cpu_add(p->counters->leaked, leaked);
	this_cpu_sub(p->counters->stuck, pvdma_stuck(p));
}

/* A driver that is gone gave back what one of the mappings was for that it had left behind. */
void pvdma_count_late(struct pvdma_device *p)
{
	this_cpu_dec(p->counters->leaked);
	this_cpu_inc(p->counters->late);
}

/* Nothing of a device without a driver is mapped any more. */
void pvdma_nothing_outstanding(struct pvdma_device *p)
{
	pvdma_count_released(raw_cpu_ptr(p->counters), pvdma_outstanding(p),
			     pvdma_outstanding_bytes(p) >> PAGE_SHIFT);
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

/* Mappings that no driver needs any more, and that are among the outstanding. */
static int pvdma_idle_show(struct seq_file *file, void *unused)
{
	const struct pvdma_device *p = file->private;
	const struct pvdma_lazy *lazy = READ_ONCE(p->lazy);

	seq_printf(file, "%u\n", lazy ? READ_ONCE(lazy->idle) : 0);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(pvdma_idle);

static int pvdma_policy_show(struct seq_file *file, void *unused)
{
	const struct pvdma_device *p = file->private;

	seq_printf(file, "%s\n", pvdma_policy_name(p->policy));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(pvdma_policy);

/* One counter of all devices since the module was loaded. */
static u64 pvdma_sum_all(size_t offset)
{
	u64 sum = pvdma_sum(&pvdma_counters, offset);
	int i;

	for (i = 0; i < PVDMA_DEVICES_MAX; i++) {
		const struct pvdma_counters __percpu *counters;

		counters = READ_ONCE(pvdma_devices[i].counters);
		if (counters)
			sum += pvdma_sum(counters, offset);
	}
	return sum;
}

static u64 pvdma_calls(u32 call)
{
	return pvdma_sum_all(CALL_AT(call));
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

static int pvdma_errors_show(struct seq_file *file, void *unused)
{
	u64 sum = 0;
	u32 class;

	for (class = PVDMA_STATUS_RETRY; class <= PVDMA_STATUS_GONE; class++)
		sum += pvdma_sum_all(ERROR_AT(class));
	seq_printf(file, "%llu\n", sum);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(pvdma_errors);

void pvdma_stats_add(struct pvdma_device *p)
{
	struct dentry *dir = NULL;
	const char *last = NULL;
	unsigned int i;

	p->dir = debugfs_create_dir(dev_name(p->dev), pvdma_dir);
	debugfs_create_u32("handle", 0444, p->dir, &p->handle);
	debugfs_create_file("policy", 0444, p->dir, p, &pvdma_policy_fops);
	debugfs_create_u64("max_mapping_bytes", 0444, p->dir, &p->mapping_max);
	debugfs_create_file("outstanding_bytes", 0444, p->dir, p, &pvdma_bytes_fops);
	debugfs_create_file("idle", 0444, p->dir, p, &pvdma_idle_fops);
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

/* The device goes, the totals stay; its counters await another. */
void pvdma_stats_remove(struct pvdma_device *p)
{
	struct pvdma_counters *totals;
	unsigned long irq;
	u32 i;
	int cpu;

	debugfs_remove(p->dir);
	p->dir = NULL;
	local_irq_save(irq);
	totals = this_cpu_ptr(&pvdma_counters);
	for (i = 0; i <= PVDMA_CALL_TABLE; i++)
		totals->calls[i] += pvdma_sum(p->counters, CALL_AT(i));
	for (i = 0; i <= PVDMA_STATUS_GONE; i++)
		totals->errors[i] += pvdma_sum(p->counters, ERROR_AT(i));
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
	debugfs_create_file("errors", 0444, pvdma_dir, NULL, &pvdma_errors_fops);
}

void pvdma_stats_exit(void)
{
	debugfs_remove(pvdma_dir);
}
