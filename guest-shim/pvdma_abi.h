/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * The pvdma hypercall contract. Generated from hypercalls/abi.ts by `npm run abi`;
 * edit that file, not this one.
 */
#ifndef PVDMA_ABI_H
#define PVDMA_ABI_H

#define PVDMA_ABI_MAJOR			1u
#define PVDMA_ABI_MINOR			2u
#define PVDMA_ABI_VERSION		(PVDMA_ABI_MAJOR << 16 | PVDMA_ABI_MINOR)

/* Discovery: CPUID leaves, relative to the base at which the signature is found */
#define PVDMA_CPUID_FIRST		0x40000100u
#define PVDMA_CPUID_LAST		0x4000ff00u
#define PVDMA_CPUID_STEP		0x100u
#define PVDMA_CPUID_SIGNATURE_EBX	0x4d445650u
#define PVDMA_CPUID_SIGNATURE_ECX	0x56502e41u
#define PVDMA_CPUID_SIGNATURE_EDX	0x2e414d44u
/* EAX: highest leaf; EBX, ECX, EDX: signature */
#define PVDMA_CPUID_LEAF_SIGNATURE	0u
/* EAX: ABI version; EBX: features; ECX 15:0: port; EDX: entries per call page */
#define PVDMA_CPUID_LEAF_INTERFACE	1u
/* EAX: most pages one call maps */
#define PVDMA_CPUID_LEAF_LIMITS		2u

/* A call is one 32-bit out: EAX the call, DX the port (this one unless CPUID says otherwise) */
#define PVDMA_PORT			0xb50u

#define PVDMA_FEATURE_LIST		0x1u
#define PVDMA_FEATURE_RELEASE		0x2u
#define PVDMA_FEATURE_TABLE		0x4u

#define PVDMA_CALL_PAGE_BYTES		4096u
#define PVDMA_ENTRY_BYTES		16u
#define PVDMA_LIST_ENTRIES		256u
#define PVDMA_MAP_PAGES_MAX		0x40000u
#define PVDMA_DEVICES_MAX		32u

/* map and map_list, r10 */
#define PVDMA_MAP_READ			0x1u
#define PVDMA_MAP_WRITE			0x2u
#define PVDMA_MAP_ALIGN			0x4u
#define PVDMA_MAP_COUNTED		0x8u

/* an entry of the tracking table; how it is used: hypercalls/abi.ts */
#define PVDMA_TABLE_COUNT_MASK		0x3fffffffu
#define PVDMA_TABLE_USED		0x40000000u
#define PVDMA_TABLE_PINNED		0x80000000u

/* is_assigned, rsi */
#define PVDMA_DEVICE_POLICY_MASK	0xffu
#define PVDMA_DEVICE_IDENTITY		0x100u
#define PVDMA_POLICY_PINNED		0u
#define PVDMA_POLICY_CACHED		1u
#define PVDMA_POLICY_LAZY		2u
#define PVDMA_POLICY_STRICT		3u

/* RAX after a call: bits 7:0 the class, bits 31:8 an errno that says more */
#define PVDMA_STATUS_CLASS(status)	((status) & 0xffu)
#define PVDMA_STATUS_ERRNO(status)	((status) >> 8 & 0xffffffu)
#define PVDMA_STATUS_OK			0u
#define PVDMA_STATUS_RETRY		1u
#define PVDMA_STATUS_LIMIT		2u
#define PVDMA_STATUS_INVALID		3u
#define PVDMA_STATUS_GONE		4u

/*
 * The calls. IN rax: the call; OUT rax: the status. Registers not named OUT keep
 * their value. OUT registers are valid with status ok, `entries done' always.
 */

/*
 * probe: What the host offers. Changes nothing.
 *   IN  rdi  the guest's ABI version
 *   IN  rsi  gpa of a call page that receives the IOVA ranges as {u64
 *                first, u64 last}; 0 for none
 *   OUT rdi  the host's ABI version
 *   OUT rsi  feature bits
 *   OUT r8   page sizes the IOMMU maps, a bit mask (bit 12 is 4 KiB)
 *   OUT r9   most bytes that may be pinned; 0 for no quota
 *   OUT r10  IOVA ranges written
 */
#define PVDMA_CALL_PROBE		1u

/*
 * is_assigned: Whether the host gives this device to the guest. Asked once per
 * device, the answer does not change.
 *   IN  rdi  segment << 16 | bus << 8 | device << 3 | function, as the
 *                guest numbers them
 *   OUT rdi  handle for the other calls; 0: not an assigned device
 *   OUT rsi  policy, and DEVICE_FLAG bits
 *   OUT r8   bits of IOVA the IOMMU translates for it
 *   OUT r9   runs of contiguous memory that its IOMMU domain maps at a
 *                time, all devices of the domain together; 0: not told (since
 *                1.1)
 *   OUT r10  most bytes that can be pinned for it at a time; 0: no limit
 *                is known (since 1.1)
 */
#define PVDMA_CALL_IS_ASSIGNED		2u

/*
 * map: Makes every page that the bytes touch reachable for the device.
 *   IN  rdi  handle
 *   IN  rsi  gpa of the first byte; the range must lie in guest RAM
 *   IN  r8   bytes, at least 1
 *   IN  r9   last IOVA the device can emit (its DMA mask)
 *   IN  r10  MAP_FLAG bits, read or write at least
 *   OUT rdi  IOVA of the first byte; the offset in the page is kept
 */
#define PVDMA_CALL_MAP			3u

/*
 * unmap: Takes back what one map or map_list gave. Range and length must be
 * those of that mapping, to the page. When it returns ok under policy strict
 * the device reaches none of it any more.
 *   IN  rdi  handle
 *   IN  rsi  IOVA of any byte of the mapping's first page
 *   IN  r8   bytes from there to its end
 *   OUT rdi  bytes unmapped, whole pages
 */
#define PVDMA_CALL_UNMAP		4u

/*
 * map_list: Maps a list as one contiguous IOVA range: the pages that each
 * entry touches, one entry after the other. All or nothing: with another
 * status than ok nothing of it is mapped, except in the rare case that the
 * host cannot undo a part; that part stays pinned, and its IOVA is given to
 * nobody. With policy cached pages may stay mapped that nobody has mapped. A
 * device with identity needs a list that is contiguous, unless the guest
 * counted its pages: each then is where its gpa says.
 *   IN  rdi  handle
 *   IN  rsi  gpa of the call page: entries {u64 gpa, u64 bytes}
 *   IN  r8   entries, 1 to 256
 *   IN  r9   last IOVA the device can emit (its DMA mask)
 *   IN  r10  MAP_FLAG bits, read or write at least
 *   OUT rdi  IOVA of the range's first page
 *   OUT rsi  entries done: all, or the index of the first that could not
 *                be done
 */
#define PVDMA_CALL_MAP_LIST		5u

/*
 * unmap_list: Unmaps a list of mappings, in order, up to the first that fails.
 *   IN  rdi  handle
 *   IN  rsi  gpa of the call page: entries {u64 iova, u64 bytes}, each as
 *                unmap takes them
 *   IN  r8   entries, 1 to 256
 *   OUT rdi  bytes unmapped, whole pages
 *   OUT rsi  entries done
 */
#define PVDMA_CALL_UNMAP_LIST		6u

/*
 * release: Takes back every mapping of a device whose driver is gone (since
 * 1.1); none of a device that has its domain's addresses, identity, in common
 * with others: see table. The caller has stopped the device first: bus
 * mastering off, or reset. With another status than ok some of it stays
 * mapped; asking again tries again.
 *   IN  rdi  handle
 *   OUT rdi  mappings taken back
 *   OUT rsi  bytes of them, whole pages
 */
#define PVDMA_CALL_RELEASE		7u

/*
 * table: Where the tracking table is that this device's policy cached uses
 * (since 1.2). Devices of one domain have one in common. Begun anew, when a
 * kernel finds it for the first time and when the last driver of such a device
 * is gone, nothing is mapped and all counts are 0; the devices of the domain
 * have to be stopped.
 *   IN  rdi  handle
 *   IN  rsi  1 to begin anew, else 0
 *   OUT rdi  gpa of the table, whole pages
 *   OUT rsi  entries; 0: this device has none
 */
#define PVDMA_CALL_TABLE		8u

#endif /* PVDMA_ABI_H */
