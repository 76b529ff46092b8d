/* ranks.h - how many tensor-parallel ranks a group has at most: one number for coordinator, worker, comm and `tandem serve`. */
#ifndef TANDEM_RANKS_H
#define TANDEM_RANKS_H

#define MAX_RANKS 64

#endif
