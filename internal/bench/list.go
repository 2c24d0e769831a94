package main

// experiments are all there are, in the order of their IDs.
var experiments = []experiment{
	relayExperiment, appendExperiment, latencyExperiment, heldExperiment,
	idempotentPGExperiment, idempotentRedisExperiment,
	sagaExperiment, sagaTxExperiment, failoverExperiment, sagaWaitingExperiment,
	lockLeaseExperiment, lockHandoffExperiment, lockFenceExperiment, lockUpdateExperiment,
	restartsExperiment, tickLatencyExperiment,
}
