/*
 * The floor for DMA: map a file at many IOVAs of an IOAS, one after the other, and unmap each again.
 *
 *     dma IOMMUFD IOAS FILE SIZE FIRST COUNT
 *
 * IOMMUFD and FILE are open descriptors, SIZE is the file's in bytes, FIRST is the lowest IOVA. The seconds are printed.
 */
#include <stdint.h>
#include <sys/ioctl.h>

#include "iommufd.h"
#include "floor.h"

int main(int argc, char **argv)
{
	double began;

	if (argc != 7)
		return 2;
	int iommufd = atoi(argv[1]), ioas = atoi(argv[2]), file = atoi(argv[3]);
	uint64_t size = atol(argv[4]), first = atol(argv[5]), count = atol(argv[6]);

	began = now();
	for (uint64_t number = 0; number < count; number++) {
		struct iommu_ioas_map_file map = {
			.size = sizeof(map), .ioas_id = ioas, .fd = file, .length = size,
			.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE |
				 IOMMU_IOAS_MAP_WRITEABLE,
			.iova = first + number * size,
		};

		check(ioctl(iommufd, IOMMU_IOAS_MAP_FILE, &map), "map");
	}
	for (uint64_t number = 0; number < count; number++) {
		struct iommu_ioas_unmap unmap = {
			.size = sizeof(unmap), .ioas_id = ioas, .iova = first + number * size, .length = size,
		};

		check(ioctl(iommufd, IOMMU_IOAS_UNMAP, &unmap), "unmap");
	}
	printf("%.6f\n", now() - began);
	return 0;
}
