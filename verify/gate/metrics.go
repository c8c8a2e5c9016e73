package gate

import (
	"fmt"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"inkan/internal/problem"
	"inkan/verify"
)

// metrics are a gate's numbers. docs/gate.md lists them.
type metrics struct {
	registry  *prometheus.Registry
	forwarded prometheus.Counter
	refused   *prometheus.CounterVec
	turned    prometheus.Counter
	seconds   prometheus.Histogram

	trouble atomic.Pointer[string] // what ailed the gate itself at the last request; nil: nothing
}

func newMetrics() *metrics {
	m := &metrics{registry: prometheus.NewRegistry(),
		forwarded: prometheus.NewCounter(prometheus.CounterOpts{Name: "inkan_gate_forwarded_total", Help: "Requests that went to the backend."}),
		refused:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_gate_refused_total", Help: "Requests that were refused."}, []string{"reason"}),
		turned:    prometheus.NewCounter(prometheus.CounterOpts{Name: "inkan_gate_connections_refused_total", Help: "Connections that were turned away before their handshake."}),
		seconds:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: "inkan_gate_seconds", Help: "One request, the backend's answer included.", Buckets: prometheus.ExponentialBuckets(0.0002, 2, 18)}),
	}
	m.registry.MustRegister(m.forwarded, m.refused, m.turned, m.seconds)
	return m
}

// own are the reasons that say something of the gate, not of the request.
var own = []verify.Reason{verify.ReasonRevocation, verify.ReasonKillState, verify.ReasonStore, ReasonRecord, ReasonBackend}

// count counts a request's outcome; refusal is nil if the backend answered.
func (m *metrics) count(forwarded bool, refusal *verify.Refusal, took time.Duration) {
	m.seconds.Observe(took.Seconds())
	if refusal != nil && refusal.Reason != "" {
		m.refused.WithLabelValues(string(refusal.Reason)).Inc()
	}
	switch {
	case refusal != nil && slices.Contains(own, refusal.Reason):
		what := refusal.Error()
		if refusal.Cause != nil {
			what = fmt.Sprintf("%s: %v", refusal.Reason, refusal.Cause)
		}
		m.trouble.Store(&what)
	case forwarded:
		m.forwarded.Inc()
		m.trouble.Store(nil)
	}
}

// Observability serves GET /metrics and GET /healthz, for a listener of its own
// that agents do not reach. Health is 503 from a request that was refused for a reason of the gate's own
// (revocation list, kill list, store, record, backend) until one is forwarded.
func (g *Gate) Observability() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(g.metrics.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if t := g.metrics.trouble.Load(); t != nil {
			problem.Write(w, problem.Problem{Status: http.StatusServiceUnavailable, Detail: *t})
			return
		}
		_, _ = w.Write([]byte("ok\n")) // the client may be gone
	})
	return mux
}
