/* SPDX-License-Identifier: MIT */
/*
 * Does what it is asked to, a byte on COM1 at a time, and prints how it went: `a'
 * to `d' maps a page for the assigned device in slot 1 to 4, `A' to `D' unmaps the
 * page that was mapped last for it, `?' asks about slot 1 anew, `q' powers off.
 */
#include "lib.h"

#define SLOTS		4
#define PAGES		16

static u8 pages[SLOTS][PAGES][4096] __attribute__((aligned(4096)));
static u64 iovas[SLOTS][PAGES];
static u32 mapped[SLOTS];
static u32 handles[SLOTS];
static struct pvdma_host host;
static struct pvdma_counters counters;

static void answered(const char *what, u32 slot, u32 status)
{
	print("guest: %s %u %s %u retries %lu\n", what, slot + 1, pvdma_status_name(status),
	      PVDMA_STATUS_ERRNO(status), (unsigned long)counters.retries);
}

static void map(u32 slot)
{
	u32 n = mapped[slot];
	u32 status;

	if (n == PAGES)
		return;
	status = pvdma_map(&host, &counters, handles[slot], (u64)pages[slot][n],
			   sizeof(pages[slot][n]), ~0ull, PVDMA_MAP_WRITE, &iovas[slot][n]);
	if (!PVDMA_STATUS_CLASS(status))
		mapped[slot]++;
	answered("map", slot, status);
}

static void unmap(u32 slot)
{
	u32 n = mapped[slot];
	u32 status;

	if (!n)
		return;
	status = pvdma_unmap(&host, &counters, handles[slot], iovas[slot][n - 1],
			     sizeof(pages[slot][n - 1]));
	if (!PVDMA_STATUS_CLASS(status))
		mapped[slot]--;
	answered("unmap", slot, status);
}

static void ask(u32 slot)
{
	struct pvdma_assignment answer = { 0 };
	u32 status = pvdma_is_assigned(&host, &counters, (slot + 1) << 3, &answer);

	if (!PVDMA_STATUS_CLASS(status))
		handles[slot] = answer.handle;
	print("guest: device %u %s %u handle %u runs %lu bytes %lu\n", slot + 1,
	      pvdma_status_name(status), PVDMA_STATUS_ERRNO(status), answer.handle,
	      (unsigned long)answer.runs, (unsigned long)answer.pinned_bytes);
}

void guest_main(void)
{
	u32 slot;
	u8 byte;

	if (pvdma_discover(&host) != PVDMA_FOUND) {
		print("guest: none\n");
		return;
	}
	for (slot = 0; slot < SLOTS; slot++)
		ask(slot);
	print("guest: ready\n");
	while ((byte = serial_read()) != 'q') {
		if (byte >= 'a' && byte < 'a' + SLOTS)
			map(byte - 'a');
		else if (byte >= 'A' && byte < 'A' + SLOTS)
			unmap(byte - 'A');
		else if (byte == '?')
			ask(0);
	}
}
