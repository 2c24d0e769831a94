package lock_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/ashlar-go/ashlar/lock"
)

// Work that only one process at a time may do.
func Example() {
	ctx := context.Background()
	locker := lock.New(new(lock.MemoryStore), nil) // lockpg.New(pool, nil) in a service
	err := locker.Do(ctx, "report of March", func(ctx context.Context, lease *lock.Lease) error {
		_, err := locker.TryLock(ctx, "report of March")
		fmt.Println(errors.Is(err, lock.ErrHeld))
		fmt.Println("writing the report, token", lease.Token())
		return ctx.Err() // ended if the lease was lost
	})
	fmt.Println(err)
	// Output:
	// true
	// writing the report, token 1
	// <nil>
}

// Two accounts are locked together, whatever the order.
func ExampleLocker_Lock() {
	ctx := context.Background()
	locker := lock.New(new(lock.MemoryStore), nil)
	lease, err := locker.Lock(ctx, "account 7", "account 3")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(lease.Keys())
	fmt.Println(lease.Release(ctx))
	// Output:
	// [account 3 account 7]
	// <nil>
}

// A change of a value that others change, too.
func ExampleUpdater() {
	ctx := context.Background()
	stock := lock.NewUpdater(new(lock.MemoryRegister[int]), nil) // lockpg.Rows in a service
	errSoldOut := errors.New("sold out")
	take := func(n int) func(int) (int, error) {
		return func(left int) (int, error) {
			if left < n {
				return 0, errSoldOut
			}
			return left - n, nil
		}
	}
	for _, change := range []func(int) (int, error){take(-5), take(3), take(3)} {
		left, version, err := stock.Update(ctx, "book", change)
		fmt.Println(left, version, err)
	}
	// Output:
	// 5 2 <nil>
	// 2 3 <nil>
	// 0 0 sold out
}
