package idempotency_test

import (
	"context"
	"fmt"

	"github.com/ashlar-go/ashlar/idempotency"
)

type receipt struct {
	Charge string
	Amount int
}

// charge stands for a call that must not be made twice.
func charge(amount int) receipt {
	fmt.Println("charging", amount)
	return receipt{Charge: "ch_1", Amount: amount}
}

// A payment that is requested twice is charged once.
func Example() {
	ctx := context.Background()
	store := new(idempotency.MemoryStore) // idempotencypg.New(pool) in a service
	pay := func(key, request string, amount int) {
		k := idempotency.Key{Scope: "merchant-7", ID: key, Fingerprint: []byte(request)}
		r, replayed, err := idempotency.Do(ctx, store, k, nil, func(context.Context) (receipt, error) {
			return charge(amount), nil
		})
		fmt.Println(r.Charge, replayed, err)
	}
	pay("order-42", "10 EUR", 1000)
	pay("order-42", "10 EUR", 1000) // the client saw no answer and asks again
	pay("order-42", "99 EUR", 9900) // a mistake of the client
	// Output:
	// charging 1000
	// ch_1 false <nil>
	// ch_1 true <nil>
	//  false idempotency: the key was used for another request
}
