// Package idempotency makes an operation that is asked for more than once happen
// once: the first request runs, every repetition gets its result.
//
// A [Key] names the operation. [Do] claims it in a [Store], runs the work,
// records the result; [Middleware] does so for HTTP requests that carry an
// Idempotency-Key. Stores are idempotencypg, idempotencyredis and
// [MemoryStore]; a [Cache] in front of any answers replays from memory.
// idempotencypg.DoTx makes claim, work and result one transaction.
//
// # Guarantees
//
//   - One at a time: of any number of concurrent requests with one key, one
//     runs; a store grants a claim atomically and fences it with a token.
//   - Once done, never again: after a result is recorded, every repetition
//     within the TTL gets that result, byte for byte, and nothing else.
//   - No stuck key: a claim ends with its lease, which its owner extends while it
//     lives and which is apart from the TTL of the record. A crash delays the
//     next attempt by one lease at most.
//   - No mix-up: keys are separated by scope, and a key that comes with another
//     fingerprint is refused.
//   - Exactly once, with idempotencypg.DoTx or CompleteTx, for effects in the
//     transaction. For any other effect: at least once, or at most once
//     ([Options].AtMostOnce), for no one can make a foreign effect and a record
//     of it one step.
//
// # What happens when
//
//	work succeeds                       its result is recorded, then returned
//	work fails cleanly                  the key is released; a retry runs at once
//	work fails, outcome unknown         the key keeps its lease, then a retry runs
//	work panics or exits its goroutine  likewise; the panic goes on
//	process dies, machine dies          likewise
//	caller's context ends               the work is told; its outcome is recorded
//	store fails at the claim            the work does not run
//	store fails while the work runs     the work's context ends before the lease
//	store fails at the record           repeated until FinishTimeout, then ErrNotRecorded
//	owner wakes after a takeover        its extension and result are refused
//	Redis loses its last writes         those operations may run again
//
// The HTTP behaviour follows draft-ietf-httpapi-idempotency-key-header.
package idempotency
