// Package saga runs a sequence of steps in several services so that, whatever is
// killed, either all of them take effect or those that did are compensated.
//
// A [Saga] is written down once, as steps and how each is undone:
//
//	trip := saga.New[Trip]("trip", 1).
//		Step("hotel", bookHotel, cancelHotel, nil).
//		Step("flight", bookFlight, cancelFlight, nil).
//		Pivot("charge", charge, nil).
//		Step("tickets", sendTickets, nil).
//		Build()
//
// A [Runner] runs instances of it from a [Store]: sagapg, or [MemoryStore]. Any
// number of runners share the work; there is no other server.
//
// # Guarantees
//
//   - It ends: a saga that was started is done, or compensated, or stuck with a
//     reason and in need of a person. What dies with it in hand delays it by one
//     lease.
//   - Undo is on record before do: a step whose outcome is not known is
//     compensated too. Compensations run the last first, each until it succeeds,
//     and no cancellation of the caller reaches them.
//   - The pivot decides: before it everything is undone, after it nothing is.
//     What comes after a pivot has no compensation, which the compiler checks.
//   - One runner at a time has a saga in hand; what another still stores of it is
//     refused, and the contexts of its steps have ended.
//   - At least once: a step that was under way is run again, with the same
//     [Call.Key]. Exactly once for steps that are transactions (sagapg.Tx) and
//     for participants behind sagapg.Barrier.
//
// # What happens when
//
//	step fails                     it is tried again, then the saga goes back
//	step refuses (Abort)           the saga goes back at once
//	step panics, exits, times out  likewise a failure, of unknown outcome
//	pivot fails to the end         stuck: nobody knows whether there is a way back
//	step after the pivot fails     it is tried again, without end by default
//	compensation fails             it is tried again, then the saga is stuck
//	saga is cancelled              steps under way are told, then it goes back
//	process dies                   another takes its sagas in hand, after the lease
//	process is paused, then wakes  its checkpoints are refused
//	every runner of a saga dies    after MaxDeaths it is stuck: it may be its fault
//	store is down                  steps under way end, checkpoints are repeated
//	                               until the lease is over
//	definition has changed         it goes on if what was begun still fits,
//	                               otherwise the saga is stuck
//
// Sagas are from Garcia-Molina and Salem, "Sagas" (1987); pivot and retriable
// steps from Chris Richardson, Microservices Patterns (2018), chapter 4.
package saga
