package issuer

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics of an issuer; docs/issuer.md lists them.
type metrics struct {
	registry    *prometheus.Registry
	issued      prometheus.Counter
	refused     *prometheus.CounterVec
	appraisal   prometheus.Histogram
	unaccounted prometheus.Counter
}

func newMetrics() *metrics {
	m := &metrics{
		registry:  prometheus.NewRegistry(),
		issued:    prometheus.NewCounter(prometheus.CounterOpts{Name: "inkan_issuer_grants_total", Help: "exchanges that ended with certificates"}),
		refused:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_issuer_refusals_total", Help: "exchanges that were refused, by the check that decided"}, []string{"check"}),
		appraisal: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "inkan_issuer_exchange_seconds", Help: "from evidence to certificates", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 12)}),
	}
	m.unaccounted = prometheus.NewCounter(prometheus.CounterOpts{Name: "inkan_issuer_unaccounted_total", Help: "periods to which a device's TPM does not testify, in renewals that were accepted"})
	m.registry.MustRegister(m.issued, m.refused, m.appraisal, m.unaccounted)
	return m
}

func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", static("text/plain", []byte("ok\n")))
	return mux
}
