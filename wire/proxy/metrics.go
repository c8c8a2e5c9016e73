package proxy

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"inkan/internal/problem"
	"inkan/scope"
	"inkan/wire"
)

// Metrics are the numbers of a process's proxies. docs/proxy.md lists them.
type Metrics struct {
	registry    *prometheus.Registry
	refused     *prometheus.CounterVec
	connections *prometheus.GaugeVec
	seconds     *prometheus.HistogramVec
	identities  map[string]*wire.Identity
}

// NewMetrics returns the metrics of proxies for these agents.
func NewMetrics(identities map[string]*wire.Identity) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), identities: identities,
		refused:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_proxy_refused_total", Help: "Requests and connections that were not forwarded."}, []string{"agent", "rule"}),
		connections: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "inkan_proxy_connections", Help: "Open connections of agents."}, []string{"agent"}),
		seconds:     prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "inkan_proxy_seconds", Help: "One request, or the beginning of one connection, whatever its outcome.", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16)}, []string{"agent"}),
	}
	m.registry.MustRegister(m.refused, m.connections, m.seconds)
	for name, i := range identities {
		labels := prometheus.Labels{"agent": name}
		m.registry.MustRegister(
			prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "inkan_proxy_signatures_total", Help: "Handshakes that the device was asked to sign.", ConstLabels: labels}, func() float64 { return float64(i.Signatures()) }),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "inkan_proxy_certificate_not_after_seconds", Help: "End of the TLS certificate, seconds since 1970.", ConstLabels: labels}, func() float64 { return float64(i.NotAfter().Unix()) }))
	}
	return m
}

// agentMetrics are those of one agent.
type agentMetrics struct {
	name        string
	refused     *prometheus.CounterVec
	connections prometheus.Gauge
	seconds     prometheus.Observer
}

func (m *Metrics) agent(name string) *agentMetrics {
	return &agentMetrics{name, m.refused, m.connections.WithLabelValues(name), m.seconds.WithLabelValues(name)}
}

func (m *agentMetrics) refuse(rule scope.Rule) { m.refused.WithLabelValues(m.name, string(rule)).Inc() }

// Server serves GET /metrics and GET /healthz.
func (m *Metrics) Server() *http.Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		for name, i := range m.identities {
			if _, err := i.Scope(); err != nil {
				problem.Write(w, problem.Problem{Status: http.StatusServiceUnavailable, Detail: name + ": " + err.Error()})
				return
			}
		}
		_, _ = w.Write([]byte("ok\n")) // the client may be gone
	})
	return &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
}
