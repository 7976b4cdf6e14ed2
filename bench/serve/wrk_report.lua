-- Posts one fixed body and prints one JSON line. WRK_BODY names the file, WRK_HEADERS holds lines "name: value".
wrk.method = "POST"
local file = assert(io.open(os.getenv("WRK_BODY"), "rb"))
wrk.body = file:read("*a")
file:close()
for name, value in os.getenv("WRK_HEADERS"):gmatch("([^:\n]+): ([^\n]+)") do wrk.headers[name] = value end

done = function(summary, latency)
  local e = summary.errors
  io.write(string.format('JSON {"seconds": %.6f, "n_answers": %d, "n_errors": %d, "p50_s": %.6f, "p99_s": %.6f}\n',
    summary.duration / 1e6, summary.requests, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
