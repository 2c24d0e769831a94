package main

// experiments are all there are, in the order of their IDs.
var experiments = []experiment{relayExperiment, appendExperiment, latencyExperiment, heldExperiment, idempotentPGExperiment, idempotentRedisExperiment, restartsExperiment, tickLatencyExperiment}
