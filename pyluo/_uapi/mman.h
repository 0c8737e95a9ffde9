/* linux/mman.h: mappings of memory. MADV_POPULATE_READ and MADV_POPULATE_WRITE since 5.14. */
#ifndef PYLUO_UAPI_MMAN_H
#define PYLUO_UAPI_MMAN_H

#define MAP_FIXED 0x10
#define MAP_NORESERVE 0x4000

#define MADV_HUGEPAGE 14
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23

#endif
