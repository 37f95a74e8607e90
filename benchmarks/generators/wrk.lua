-- Print the result of a run of wrk as one line of JSON, in the words of the other generators.

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"messages": %d, "failures": %d, "seconds": %.6f, "p50": %.6f, "p99": %.6f, "p999": %.6f}\n',
    summary.requests,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    summary.duration / 1e6,
    latency:percentile(50) / 1e6,
    latency:percentile(99) / 1e6,
    latency:percentile(99.9) / 1e6))
end
