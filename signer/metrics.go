package signer

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics of a signer; docs/signer.md lists them.
type metrics struct {
	registry *prometheus.Registry
	signed   *prometheus.CounterVec
	refused  *prometheus.CounterVec
	device   *prometheus.HistogramVec
	approver *prometheus.HistogramVec
	action   prometheus.Histogram
	notAfter *prometheus.GaugeVec
	callers  prometheus.Counter
	renewals *prometheus.CounterVec

	checkpointAt *prometheus.GaugeVec
	reserveUntil *prometheus.GaugeVec
	reserved     *prometheus.CounterVec
	killList     prometheus.Gauge
}

// agentMetrics are those of one agent.
type agentMetrics struct {
	signed   prometheus.Counter
	refused  *prometheus.CounterVec
	device   prometheus.Observer
	approver prometheus.Observer
	notAfter prometheus.Gauge

	reserveUntil  prometheus.Gauge
	reserveSigned prometheus.Counter
}

func newMetrics() *metrics {
	agent := []string{"agent"}
	buckets := prometheus.ExponentialBuckets(0.0001, 2, 16)
	m := &metrics{
		registry: prometheus.NewRegistry(),
		signed:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_signer_signed_total", Help: "actions that were signed"}, agent),
		refused:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_signer_refused_total", Help: "actions that were refused, by rule"}, []string{"agent", "rule"}),
		device:   prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "inkan_signer_device_seconds", Help: "one signature of the device, waiting for it included", Buckets: buckets}, agent),
		approver: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "inkan_signer_approver_seconds", Help: "one authorization by the approvers, for keys in approver mode", Buckets: buckets}, agent),
		action:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: "inkan_signer_action_seconds", Help: "one request to sign, whatever its answer", Buckets: buckets}),
		notAfter: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "inkan_signer_certificate_not_after_seconds", Help: "end of the agent's certificate, in seconds since 1970"}, agent),
		callers:  prometheus.NewCounter(prometheus.CounterOpts{Name: "inkan_signer_unknown_callers_total", Help: "requests of processes that are no agent"}),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_signer_renewals_total", Help: "renewals of certificates, by outcome"}, []string{"agent", "outcome"}),
	}
	m.checkpointAt = prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "inkan_signer_checkpoint_seconds", Help: "when the head of the agent's record was last signed, in seconds since 1970"}, agent)
	m.reserveUntil = prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "inkan_signer_reserve_until_seconds", Help: "end of the consent to the agent's reserve, in seconds since 1970; 0: there is none"}, agent)
	m.reserved = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_signer_reserve_signed_total", Help: "actions that were signed with the reserve's key, while no approver answered"}, agent)
	m.killList = prometheus.NewGauge(prometheus.GaugeOpts{Name: "inkan_signer_kill_list_seconds", Help: "when the issuer's kill list was last seen, in seconds since 1970"})
	m.registry.MustRegister(m.reserveUntil, m.reserved, m.killList, m.checkpointAt, m.signed, m.refused, m.device, m.approver, m.action, m.notAfter, m.callers, m.renewals)
	return m
}

func (m *metrics) agent(name string) *agentMetrics {
	return &agentMetrics{m.signed.WithLabelValues(name), m.refused, m.device.WithLabelValues(name), m.approver.WithLabelValues(name), m.notAfter.WithLabelValues(name), m.reserveUntil.WithLabelValues(name), m.reserved.WithLabelValues(name)}
}

func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	return mux
}
