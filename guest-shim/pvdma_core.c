// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The portable half of the guest. Touches memory that it is handed and the host,
 * through the transport; nothing of an operating system. Address conventions: see
 * pvdma_core.h.
 */
#include "pvdma_core.h"

#ifndef PVDMA_TRANSPORT
#define PVDMA_TRANSPORT "pvdma_transport_pio.h"
#endif
#include PVDMA_TRANSPORT

/* A host of our major that answers with a class we do not know made a mistake. */
static u32 class_of(u32 status)
{
	u32 class = PVDMA_STATUS_CLASS(status);

	return class <= PVDMA_STATUS_GONE ? class : PVDMA_STATUS_INVALID;
}

static u32 give_up(struct pvdma_counters *counters, u32 status)
{
	counters->errors[class_of(status)]++;
	return status;
}

/* The call itself, once. */
static u32 call_once(const struct pvdma_host *host,
		     struct pvdma_counters *counters, u32 number,
		     struct pvdma_frame *frame)
{
	frame->rax = number;
	counters->calls[number]++;
	pvdma_transport_call(host, frame);
	return (u32)frame->rax;
}

/* The call, again while the host says retry; the frame is the answer's. */
static u32 call(const struct pvdma_host *host, struct pvdma_counters *counters,
		u32 number, struct pvdma_frame *frame, u32 tries)
{
	const struct pvdma_frame question = *frame;
	u32 status;

	for (;;) {
		status = call_once(host, counters, number, frame);
		if (class_of(status) != PVDMA_STATUS_RETRY || !--tries)
			return status;
		counters->retries++;
		pvdma_transport_relax();
		*frame = question;
	}
}

enum pvdma_found pvdma_discover(struct pvdma_host *host)
{
	const struct pvdma_host none = { 0 };
	struct pvdma_cpuid leaf;
	u32 base, highest;

	*host = none;
	for (base = PVDMA_CPUID_FIRST; base <= PVDMA_CPUID_LAST; base += PVDMA_CPUID_STEP) {
		leaf = pvdma_transport_cpuid(base + PVDMA_CPUID_LEAF_SIGNATURE);
		if (leaf.ebx == PVDMA_CPUID_SIGNATURE_EBX &&
		    leaf.ecx == PVDMA_CPUID_SIGNATURE_ECX &&
		    leaf.edx == PVDMA_CPUID_SIGNATURE_EDX)
			break;
	}
	if (base > PVDMA_CPUID_LAST)
		return PVDMA_NO_HOST;
	highest = leaf.eax;
	if (highest < base + PVDMA_CPUID_LEAF_INTERFACE)
		return PVDMA_NO_HOST;

	leaf = pvdma_transport_cpuid(base + PVDMA_CPUID_LEAF_INTERFACE);
	host->version = leaf.eax;
	if (host->version >> 16 != PVDMA_ABI_MAJOR)
		return PVDMA_OTHER_MAJOR;
	host->features = leaf.ebx;
	host->port = (u16)leaf.ecx;
	if (host->features & PVDMA_FEATURE_LIST) {
		host->list_entries = leaf.edx;
		if (host->list_entries > PVDMA_LIST_ENTRIES)
			host->list_entries = PVDMA_LIST_ENTRIES;
	}

	host->map_pages = PVDMA_MAP_PAGES_MAX;
	if (highest >= base + PVDMA_CPUID_LEAF_LIMITS) {
		leaf = pvdma_transport_cpuid(base + PVDMA_CPUID_LEAF_LIMITS);
		if (leaf.eax)
			host->map_pages = leaf.eax;
	}
	return PVDMA_FOUND;
}

u32 pvdma_probe(const struct pvdma_host *host, struct pvdma_counters *counters,
		u64 ranges_gpa, struct pvdma_offer *offer)
{
	struct pvdma_frame frame = { .rdi = PVDMA_ABI_VERSION, .rsi = ranges_gpa };
	u32 status = call(host, counters, PVDMA_CALL_PROBE, &frame, PVDMA_MAP_TRIES);

	if (class_of(status))
		return give_up(counters, status);
	offer->version = (u32)frame.rdi;
	offer->features = (u32)frame.rsi;
	offer->page_sizes = frame.r8;
	offer->quota_bytes = frame.r9;
	offer->iova_ranges = 0;
	if (ranges_gpa)
		offer->iova_ranges = frame.r10 < PVDMA_LIST_ENTRIES ?
				     (u32)frame.r10 : PVDMA_LIST_ENTRIES;
	return status;
}

u32 pvdma_is_assigned(const struct pvdma_host *host,
		      struct pvdma_counters *counters, u32 rid,
		      struct pvdma_assignment *answer)
{
	struct pvdma_frame frame = { .rdi = rid };
	u32 status = call(host, counters, PVDMA_CALL_IS_ASSIGNED, &frame,
			  PVDMA_MAP_TRIES);

	if (class_of(status))
		return give_up(counters, status);
	answer->handle = (u32)frame.rdi;
	answer->policy = (u32)frame.rsi & PVDMA_DEVICE_POLICY_MASK;
	answer->identity = frame.rsi & PVDMA_DEVICE_IDENTITY;
	answer->iova_bits = (u32)frame.r8;
	/* a host of 1.0 leaves these as they were asked: 0 */
	answer->runs = frame.r9;
	answer->pinned_bytes = frame.r10;
	return status;
}

/*
 * How large may a mapping be that has to fit beside what the driver keeps mapped?
 *
 * A map is all or nothing, and who waits for one holds none: what a driver does to
 * a request before it fails is undone (nvme gives back the data's mapping when it
 * gets no memory for the list of its pages, and map_sg its first ranges when a
 * later one fails). So requests that are under way finish, what they had comes
 * back, and it is enough that any one request fits beside what is there for good.
 *
 * Let n be the runs or the pages, whichever is less, that can be mapped at a time. A
 * request of k pages takes up to k + 1: each page may be a run of its own, and the
 * first byte need not be a page's first.
 *
 * For good are the driver's queues, s of them, and the pages of its dma_pools, which
 * grow and never shrink: nvme takes a page for each request under way of 34 pages
 * and more, and for every 16 shorter ones. When the pools grew, each of these
 * requests had a run mapped at least, so that they are half of n - s at most. This
 * leaves (n - s) / 2 to a request, and with half of n for s, n / 4: k = n / 4 - 1.
 *
 * nvme takes this size from max_mapping_size on 6.1 and from opt_mapping_size on
 * 6.12, so one must not be larger than the other. Devices that share a domain have
 * their queues in s together. A limit below 8 leaves one page, and to luck whether
 * the queues leave two runs for it.
 *
 * With 65,535 runs it is 64 MiB, more than drivers ask for (nvme 8 MiB).
 */
u64 pvdma_mapping_max(const struct pvdma_host *host,
		      const struct pvdma_assignment *device)
{
	u64 n = device->runs ? device->runs : ~0ull;
	u64 pages = host->map_pages;

	if (device->pinned_bytes && device->pinned_bytes >> PVDMA_PAGE_SHIFT < n)
		n = device->pinned_bytes >> PVDMA_PAGE_SHIFT;
	if (n / 4 < pages)
		pages = n / 4;
	return (pages > 2 ? pages - 1 : 1) << PVDMA_PAGE_SHIFT;
}

static void count_made(struct pvdma_counters *counters, u64 pages)
{
	counters->pages_mapped += pages;
	counters->outstanding++;
}

static void count_undone(struct pvdma_counters *counters, u64 pages)
{
	counters->pages_unmapped += pages;
	counters->outstanding--;
}

void pvdma_count_released(struct pvdma_counters *counters, s64 mappings, u64 pages)
{
	counters->pages_released += pages;
	counters->outstanding -= mappings;
}

/* A mapping that was not unmapped: is it there all the same? */
static u32 give_up_unmap(struct pvdma_counters *counters, u32 status, u64 pages)
{
	switch (class_of(status)) {
	case PVDMA_STATUS_GONE:
		pvdma_count_released(counters, 1, pages);
		break;
	case PVDMA_STATUS_RETRY:
	case PVDMA_STATUS_LIMIT:
		counters->stuck++;
		break;
	}
	return give_up(counters, status);
}

/* Can a device that emits addresses up to iova_max use [iova, bytes)? */
static bool usable(u64 iova, u64 bytes, u64 iova_max)
{
	return iova <= iova_max && bytes - 1 <= iova_max - iova;
}

u32 pvdma_map(const struct pvdma_host *host, struct pvdma_counters *counters,
	      u32 handle, u64 gpa, u64 bytes, u64 iova_max, u32 flags,
	      u64 *iova)
{
	struct pvdma_frame frame = {
		.rdi = handle, .rsi = gpa, .r8 = bytes, .r9 = iova_max, .r10 = flags,
	};
	u32 status = call(host, counters, PVDMA_CALL_MAP, &frame, PVDMA_MAP_TRIES);

	if (class_of(status))
		return give_up(counters, status);
	count_made(counters, pvdma_pages(gpa, bytes));
	counters->maps++;
	if (((frame.rdi ^ gpa) & (PVDMA_PAGE_BYTES - 1)) ||
	    !usable(frame.rdi, bytes, iova_max)) {
		pvdma_unmap(host, counters, handle, frame.rdi, bytes);
		return give_up(counters, PVDMA_STATUS_INVALID);
	}
	*iova = frame.rdi;
	return status;
}

u32 pvdma_unmap(const struct pvdma_host *host, struct pvdma_counters *counters,
		u32 handle, u64 iova, u64 bytes)
{
	struct pvdma_frame frame = { .rdi = handle, .rsi = iova, .r8 = bytes };
	u32 status = call(host, counters, PVDMA_CALL_UNMAP, &frame, PVDMA_UNMAP_TRIES);

	if (class_of(status))
		return give_up_unmap(counters, status, pvdma_pages(iova, bytes));
	count_undone(counters, pvdma_pages(iova, bytes));
	counters->unmaps++;
	return status;
}

u32 pvdma_release(const struct pvdma_host *host, struct pvdma_counters *counters,
		  u32 handle, struct pvdma_released *released)
{
	struct pvdma_frame frame = { .rdi = handle };
	u32 status;

	if (!(host->features & PVDMA_FEATURE_RELEASE))
		return PVDMA_STATUS_INVALID;
	status = call(host, counters, PVDMA_CALL_RELEASE, &frame, PVDMA_UNMAP_TRIES);
	if (class_of(status))
		return give_up(counters, status);
	released->mappings = frame.rdi;
	released->bytes = frame.rsi;
	return status;
}

u32 pvdma_find_table(const struct pvdma_host *host, struct pvdma_counters *counters,
		     u32 handle, bool anew, struct pvdma_table *table)
{
	struct pvdma_frame frame = { .rdi = handle, .rsi = anew };
	u32 status;

	if (!(host->features & PVDMA_FEATURE_TABLE))
		return PVDMA_STATUS_INVALID;
	status = call(host, counters, PVDMA_CALL_TABLE, &frame, PVDMA_UNMAP_TRIES);
	if (class_of(status))
		return give_up(counters, status);
	table->gpa = frame.rdi;
	table->pages = frame.rsi;
	return status;
}

u32 pvdma_map_counted(const struct pvdma_host *host, struct pvdma_counters *counters,
		      u32 handle, const struct pvdma_list *list, u64 page_gpa,
		      u64 iova_max, u32 flags)
{
	struct pvdma_frame frame = {
		.rdi = handle, .r9 = iova_max, .r10 = flags | PVDMA_MAP_COUNTED,
	};
	u32 number = PVDMA_CALL_MAP_LIST;
	u32 status;

	if (list->count == 1) {
		number = PVDMA_CALL_MAP;
		frame.rsi = list->entries[0].address;
		frame.r8 = list->entries[0].bytes;
	} else {
		frame.rsi = page_gpa;
		frame.r8 = list->count;
	}
	status = call(host, counters, number, &frame, PVDMA_MAP_TRIES);
	return class_of(status) ? give_up(counters, status) : status;
}

void pvdma_list_start(struct pvdma_list *list, struct pvdma_entry *entries,
		      u32 max_entries, u64 max_pages, u64 boundary)
{
	list->entries = entries;
	list->max_entries = max_entries;
	list->max_pages = max_pages;
	list->boundary = boundary;
	list->count = 0;
	list->pages = 0;
	list->bytes = 0;
}

bool pvdma_list_add(struct pvdma_list *list, u64 gpa, u64 bytes)
{
	u64 pages = pvdma_pages(gpa, bytes);

	if (list->count) {
		/* where it would lie, from the start of the aligned range */
		u64 first = (list->pages << PVDMA_PAGE_SHIFT) +
			    (gpa & (PVDMA_PAGE_BYTES - 1));
		u64 last = first + bytes - 1;

		if (list->count >= list->max_entries ||
		    list->pages >= list->max_pages ||
		    pages > list->max_pages - list->pages ||
		    ((first ^ last) & ~list->boundary))
			return false;
	}
	if (list->entries) {
		list->entries[list->count].address = gpa;
		list->entries[list->count].bytes = bytes;
	}
	list->count++;
	list->pages += pages;
	list->bytes += bytes;
	return true;
}

u32 pvdma_map_list(const struct pvdma_host *host,
		   struct pvdma_counters *counters, u32 handle,
		   const struct pvdma_list *list, u64 page_gpa, u64 iova_max,
		   u32 flags, u64 *iova)
{
	struct pvdma_frame frame = {
		.rdi = handle, .rsi = page_gpa, .r8 = list->count, .r9 = iova_max,
		.r10 = flags,
	};
	u64 bytes = list->pages << PVDMA_PAGE_SHIFT;
	u32 status;

	if (list->count == 1) {
		status = pvdma_map(host, counters, handle,
				   list->entries[0].address, list->entries[0].bytes,
				   iova_max, flags, iova);
		if (!class_of(status))
			*iova &= ~(PVDMA_PAGE_BYTES - 1);
		return status;
	}

	status = call(host, counters, PVDMA_CALL_MAP_LIST, &frame, PVDMA_MAP_TRIES);
	if (class_of(status))
		return give_up(counters, status);
	count_made(counters, list->pages);
	counters->map_lists++;
	if ((frame.rdi & (PVDMA_PAGE_BYTES - 1)) || frame.rsi != list->count ||
	    !usable(frame.rdi, bytes, iova_max | (PVDMA_PAGE_BYTES - 1))) {
		pvdma_unmap(host, counters, handle, frame.rdi, bytes);
		return give_up(counters, PVDMA_STATUS_INVALID);
	}
	*iova = frame.rdi;
	return status;
}

/* Forgets the first n of count entries. */
static u32 drop_entries(struct pvdma_entry *entries, u32 count, u32 n)
{
	u32 i;

	for (i = n; i < count; i++)
		entries[i - n] = entries[i];
	return count - n;
}

u32 pvdma_unmap_list(const struct pvdma_host *host,
		     struct pvdma_counters *counters, u32 handle,
		     struct pvdma_entry *entries, u64 page_gpa, u32 count,
		     u32 *failed)
{
	u32 tries = PVDMA_UNMAP_TRIES;
	u32 first_bad = PVDMA_STATUS_OK;

	*failed = 0;
	while (count) {
		struct pvdma_frame frame = {
			.rdi = handle, .rsi = page_gpa, .r8 = count,
		};
		u32 status = call_once(host, counters, PVDMA_CALL_UNMAP_LIST, &frame);
		u32 done = frame.rsi < count ? (u32)frame.rsi : count;
		u32 i;

		for (i = 0; i < done; i++)
			count_undone(counters, pvdma_pages(entries[i].address,
							   entries[i].bytes));
		if (!class_of(status) && done == count) {
			counters->unmap_lists++;
			break;
		}
		count = drop_entries(entries, count, done);
		if (done)	/* the patience is for each of them */
			tries = PVDMA_UNMAP_TRIES;
		if (class_of(status) == PVDMA_STATUS_RETRY && --tries) {
			counters->retries++;
			pvdma_transport_relax();
			continue;
		}
		/* ok, and yet not all: nothing says why */
		if (!class_of(status))
			status = PVDMA_STATUS_INVALID;
		if (!first_bad)
			first_bad = status;
		if (count) {
			give_up_unmap(counters, status, pvdma_pages(entries[0].address,
								    entries[0].bytes));
			if (class_of(status) != PVDMA_STATUS_GONE)
				(*failed)++;
			count = drop_entries(entries, count, 1);
		} else {
			give_up(counters, status);
		}
		tries = PVDMA_UNMAP_TRIES;
	}
	return first_bad;
}

u64 pvdma_place(u64 *cursor, u64 gpa, u64 bytes)
{
	u64 iova = *cursor + (gpa & (PVDMA_PAGE_BYTES - 1));

	*cursor += pvdma_pages(gpa, bytes) << PVDMA_PAGE_SHIFT;
	return iova;
}

bool pvdma_segment_join(struct pvdma_segment *segment, u64 iova, u64 bytes,
			u64 max_bytes, u64 boundary)
{
	if (segment->iova + segment->bytes != iova ||
	    segment->bytes > max_bytes || bytes > max_bytes - segment->bytes ||
	    ((segment->iova ^ (iova + bytes - 1)) & ~boundary))
		return false;
	segment->bytes += bytes;
	return true;
}

const char *pvdma_status_name(u32 status)
{
	static const char * const names[] = { "ok", "retry", "limit", "invalid", "gone" };
	u32 class = PVDMA_STATUS_CLASS(status);

	return class <= PVDMA_STATUS_GONE ? names[class] : "unknown status";
}

const char *pvdma_policy_name(u32 policy)
{
	static const char * const names[] = { "pinned", "cached", "lazy", "strict" };

	return policy <= PVDMA_POLICY_STRICT ? names[policy] : "unknown policy";
}
