package approver

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics of an approver; docs/approver.md lists them.
type metrics struct {
	registry   *prometheus.Registry
	authorized *prometheus.CounterVec
	consents   *prometheus.CounterVec
	refused    *prometheus.CounterVec
	seconds    prometheus.Histogram

	recordErrors prometheus.Counter
}

func newMetrics() *metrics {
	m := &metrics{
		registry:   prometheus.NewRegistry(),
		authorized: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_approver_authorized_total", Help: "signatures that were authorized"}, []string{"agent"}),
		consents:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_approver_consents_total", Help: "consents to an agent's reserve"}, []string{"agent"}),
		refused:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_approver_refused_total", Help: "requests that were refused, by rule"}, []string{"rule"}),
		seconds:    prometheus.NewHistogram(prometheus.HistogramOpts{Name: "inkan_approver_request_seconds", Help: "one request, whatever its answer", Buckets: prometheus.ExponentialBuckets(0.0001, 2, 16)}),
	}
	m.recordErrors = prometheus.NewCounter(prometheus.CounterOpts{Name: "inkan_approver_record_errors_total", Help: "requests that were refused since the record's database failed"})
	m.registry.MustRegister(m.authorized, m.consents, m.refused, m.seconds, m.recordErrors)
	return m
}

func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	return mux
}
