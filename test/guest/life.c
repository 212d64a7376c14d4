/* SPDX-License-Identifier: MIT */
/*
 * The life of a machine: maps a page for the first assigned device, leaves it
 * mapped, and ends as the command line asks for: `reset', `fault' (a triple
 * fault), `flood' (prints for ever), `wait' (for a byte, then power-off).
 */
#include "lib.h"

static u8 page[4096] __attribute__((aligned(4096)));

static void map_page(void)
{
	struct pvdma_counters counters = { 0 };
	struct pvdma_assignment assignment;
	struct pvdma_host host;
	u64 iova;
	u32 slot;

	if (pvdma_discover(&host) != PVDMA_FOUND)
		return;
	for (slot = 1; slot < 32; slot++) {
		if (pvdma_is_assigned(&host, &counters, slot << 3, &assignment) != 0 ||
		    !assignment.handle)
			continue;
		if (pvdma_map(&host, &counters, assignment.handle, (u64)page, sizeof(page),
			      ~0ull, PVDMA_MAP_READ, &iova) == 0)
			print("guest: mapped\n");
		return;
	}
}

static void triple_fault(void)
{
	static const struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) none = { 0, 0 };

	/* No descriptor for the exception, nor for the double fault after it. */
	__asm__ volatile("lidt %0\n\tud2" : : "m"(none));
}

void guest_main(void)
{
	map_page();
	print("guest: alive\n");
	if (has_option("reset"))
		reset();
	if (has_option("fault"))
		triple_fault();
	while (has_option("flood"))
		print("guest: and so on and on and on and on and on and on and on\n");
	if (has_option("wait"))
		print("guest: got %x\n", serial_read());
}
