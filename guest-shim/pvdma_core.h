/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * The portable half of the guest: finding the host, one function per hypercall,
 * the arithmetic of lists. Plain C without an operating system, so that a
 * freestanding guest uses it as pvdma.ko does.
 *
 * gpa is a guest-physical address, iova a bus address; both and all lengths are
 * in bytes. Ranges are start and length; iova_max and boundary are inclusive.
 * A status is what hypercalls/abi.ts calls one: PVDMA_STATUS_CLASS() of it
 * decides, 0 is success.
 */
#ifndef PVDMA_CORE_H
#define PVDMA_CORE_H

#include "pvdma_abi.h"

#ifdef __KERNEL__
#include <linux/types.h>
#else
#include <stdbool.h>
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed long long s64;
#endif

#define PVDMA_PAGE_BYTES	4096ull
#define PVDMA_PAGE_SHIFT	12

/* How often a call is made while the host answers retry. An unmap that is given
 * up leaves a page reachable, so it is worth more patience than a map, which the
 * caller can fail.
 */
#define PVDMA_MAP_TRIES		16u
#define PVDMA_UNMAP_TRIES	256u

/* The registers of a call, as the contract names them. */
struct pvdma_frame {
	u64 rax;
	u64 rdi;
	u64 rsi;
	u64 r8;
	u64 r9;
	u64 r10;
};

/* What discovery found. */
struct pvdma_host {
	u32 version;		/* major << 16 | minor */
	u32 features;		/* PVDMA_FEATURE_* */
	u16 port;
	u32 list_entries;	/* most entries of one list call; 0: no lists */
	u64 map_pages;		/* most pages of one call */
};

enum pvdma_found {
	PVDMA_FOUND,
	PVDMA_NO_HOST,		/* no leaf carries the signature */
	PVDMA_OTHER_MAJOR,	/* version is set, nothing else is */
};

/* What probe tells beyond discovery. */
struct pvdma_offer {
	u32 version;
	u32 features;
	u64 page_sizes;		/* bit n: the IOMMU maps pages of 1 << n bytes */
	u64 quota_bytes;	/* 0: none */
	u32 iova_ranges;	/* written to the call page */
};

struct pvdma_iova_range {
	u64 first;
	u64 last;
};

/* The answer to is_assigned. */
struct pvdma_assignment {
	u32 handle;		/* 0: not an assigned device */
	u32 policy;		/* PVDMA_POLICY_* */
	bool identity;		/* iova = gpa */
	u32 iova_bits;
	u64 runs;		/* of memory its IOMMU domain maps at a time; 0: not told */
	u64 pinned_bytes;	/* most that can be pinned for it; 0: no limit is known */
};

/* What release took back. */
struct pvdma_released {
	u64 mappings;
	u64 bytes;
};

/* An entry of a list in the call page. */
struct pvdma_entry {
	u64 address;		/* map_list: gpa; unmap_list: iova */
	u64 bytes;
};

/*
 * Counts of one user of the core. Plain adds: the caller gives each CPU a block
 * of its own and keeps interrupts out while a function here runs.
 */
struct pvdma_counters {
	u64 calls[PVDMA_CALL_TABLE + 1];	/* by call, repeats included */
	u64 maps;		/* mappings made by map */
	u64 unmaps;		/* mappings undone by unmap */
	u64 map_lists;		/* mappings made by map_list */
	u64 unmap_lists;	/* unmap_list calls that did all they were given */
	u64 pages_mapped;
	u64 pages_unmapped;
	u64 retries;		/* calls repeated: the host said retry, or there was room made */
	u64 errors[PVDMA_STATUS_GONE + 1];	/* operations given up, by class */
	u64 pages_released;	/* undone without an unmap: with their device, by release */
	s64 outstanding;	/* mappings made and not undone */
	s64 stuck;		/* of these, unmapped in vain: the host would not */
	s64 leaked;		/* mappings that drivers left behind: the caller's to count */
	u64 late;		/* mappings of these that their driver undid later: likewise */
	u64 reused;		/* maps that found theirs idle, and needed no call: likewise */
};

/**
 * pvdma_discover() - look for the host in the CPUID leaves
 * @host: filled with what was found
 *
 * Limits that a host must not announce are brought into range here.
 */
enum pvdma_found pvdma_discover(struct pvdma_host *host);

/**
 * pvdma_probe() - ask what the host offers
 * @ranges_gpa: gpa of a call page for the IOVA ranges, 0 for none
 */
u32 pvdma_probe(const struct pvdma_host *host, struct pvdma_counters *counters,
		u64 ranges_gpa, struct pvdma_offer *offer);

/**
 * pvdma_is_assigned() - ask whether a device is the host's
 * @rid: segment << 16 | bus << 8 | device << 3 | function
 */
u32 pvdma_is_assigned(const struct pvdma_host *host,
		      struct pvdma_counters *counters, u32 rid,
		      struct pvdma_assignment *answer);

/**
 * pvdma_map() - let the device reach @bytes bytes from @gpa
 * @iova_max: last address the device can emit
 * @flags: PVDMA_MAP_*
 * @iova: bus address of the first byte, set on success only
 *
 * An answer the device could not use (beyond @iova_max, or with another offset
 * in the page) is taken back and reported as invalid.
 */
u32 pvdma_map(const struct pvdma_host *host, struct pvdma_counters *counters,
	      u32 handle, u64 gpa, u64 bytes, u64 iova_max, u32 flags,
	      u64 *iova);

/**
 * pvdma_unmap() - take back one mapping; @iova and @bytes as it was made
 *
 * Return: a status. With the device the mapping is gone, too.
 */
u32 pvdma_unmap(const struct pvdma_host *host, struct pvdma_counters *counters,
		u32 handle, u64 iova, u64 bytes);

/*
 * A list on its way to become one contiguous iova range, and the same list seen
 * again when it is unmapped: both build it by the same rules from the same
 * entries, so the ranges of a long list need not be remembered.
 */
struct pvdma_list {
	struct pvdma_entry *entries;	/* call page; NULL: only measure */
	u32 max_entries;
	u64 max_pages;
	u64 boundary;		/* no entry may cross a multiple of this + 1 */
	u32 count;
	u64 pages;
	u64 bytes;		/* sum of the entries' lengths */
};

/** pvdma_list_start() - an empty list. @max_entries at least 1. */
void pvdma_list_start(struct pvdma_list *list, struct pvdma_entry *entries,
		      u32 max_entries, u64 max_pages, u64 boundary);

/**
 * pvdma_list_add() - append @bytes (at least 1) from @gpa
 *
 * Return: false when the list has to end before this entry. The first entry is
 * always taken. That no entry crosses a boundary holds for a range aligned to
 * its length (PVDMA_MAP_ALIGN).
 */
bool pvdma_list_add(struct pvdma_list *list, u64 gpa, u64 bytes);

/**
 * pvdma_map_list() - map a list that was built in a call page
 * @page_gpa: gpa of that page
 * @iova: first page of the range, set on success only
 *
 * All or nothing. A list of one entry is made with map.
 */
u32 pvdma_map_list(const struct pvdma_host *host,
		   struct pvdma_counters *counters, u32 handle,
		   const struct pvdma_list *list, u64 page_gpa, u64 iova_max,
		   u32 flags, u64 *iova);

/**
 * pvdma_unmap_list() - unmap several mappings
 * @entries: the call page, filled with @count mappings; destroyed
 * @failed: how many of them the host did not unmap
 *
 * A mapping that fails is stepped over, the rest is still unmapped. What is gone
 * with its device has not failed.
 * Return: the first status that was not ok.
 */
u32 pvdma_unmap_list(const struct pvdma_host *host,
		     struct pvdma_counters *counters, u32 handle,
		     struct pvdma_entry *entries, u64 page_gpa, u32 count,
		     u32 *failed);

/**
 * pvdma_release() - take back all that is mapped for a device
 *
 * The device has to be stopped first: bus mastering off, or reset. A host without
 * the call is not asked: invalid. What it undoes is the caller's to count, with
 * pvdma_count_released().
 */
u32 pvdma_release(const struct pvdma_host *host, struct pvdma_counters *counters,
		  u32 handle, struct pvdma_released *released);

/** pvdma_count_released() - @mappings of @pages pages in all went without an unmap */
void pvdma_count_released(struct pvdma_counters *counters, s64 mappings, u64 pages);

/**
 * pvdma_mapping_max() - the longest mapping a driver should make, in bytes
 *
 * Whole pages, at least one: what can be mapped at some time, if not at any.
 */
u64 pvdma_mapping_max(const struct pvdma_host *host,
		      const struct pvdma_assignment *device);

/** pvdma_pages() - pages that @bytes bytes (at least 1) from @address touch */
static inline u64 pvdma_pages(u64 address, u64 bytes)
{
	u64 offset = address & (PVDMA_PAGE_BYTES - 1);

	/* the last byte's page, not a rounding up that could wrap */
	return ((offset + bytes - 1) >> PVDMA_PAGE_SHIFT) + 1;
}

#include "pvdma_table.h"

/**
 * pvdma_find_table() - ask where the tracking table of a device is
 * @anew: nothing is to be mapped and counted any more. The devices that share the
 *	  table have been stopped.
 * @table: @gpa and @pages are set; 0 pages: the device has none
 *
 * A host without the call is not asked: invalid.
 */
u32 pvdma_find_table(const struct pvdma_host *host, struct pvdma_counters *counters,
		     u32 handle, bool anew, struct pvdma_table *table);

/**
 * pvdma_map_counted() - have the host map what is counted in the tracking table
 * @page_gpa: gpa of the call page in which @list was built
 *
 * The addresses are the gpas. When it fails the caller takes its counts back.
 */
u32 pvdma_map_counted(const struct pvdma_host *host, struct pvdma_counters *counters,
		      u32 handle, const struct pvdma_list *list, u64 page_gpa,
		      u64 iova_max, u32 flags);

/**
 * pvdma_place() - bus address of an entry in its list's range
 * @cursor: start: the range's first page; moved past the entry's pages
 */
u64 pvdma_place(u64 *cursor, u64 gpa, u64 bytes);

/* What a device sees as one piece. */
struct pvdma_segment {
	u64 iova;
	u64 bytes;
};

/**
 * pvdma_segment_join() - make a segment longer by what follows it
 *
 * Return: false, and nothing changed, when [@iova, @bytes) does not follow at
 * once, or the segment would be longer than @max_bytes or cross a multiple of
 * @boundary + 1.
 */
bool pvdma_segment_join(struct pvdma_segment *segment, u64 iova, u64 bytes,
			u64 max_bytes, u64 boundary);

/** pvdma_status_name() - the class of a status in a word */
const char *pvdma_status_name(u32 status);

/** pvdma_policy_name() - a policy in a word */
const char *pvdma_policy_name(u32 policy);

#endif /* PVDMA_CORE_H */
