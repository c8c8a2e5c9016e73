package signer

import (
	"context"
	"encoding/pem"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"inkan/audit"
	"inkan/scope"
)

// DeviceStatus is what operators see of the device that an agent's key is in.
// The members after Kind are those of a token's worker process.
type DeviceStatus struct {
	Kind           string  `json:"kind"`                   // tpm or pkcs11
	CommandAudit   string  `json:"command_audit,omitzero"` // of a TPM: on, or why it does not testify to its signatures
	WorkerPID      int     `json:"worker_pid,omitzero"`
	Generation     uint64  `json:"generation,omitzero"` // workers started so far
	Sessions       int     `json:"sessions,omitzero"`
	Breaker        string  `json:"breaker,omitzero"` // closed: calls are tried; open: they are refused at once
	Signatures     uint64  `json:"signatures,omitzero"`
	Failures       uint64  `json:"failures,omitzero"` // those included that a second try made good
	LastError      string  `json:"last_error,omitzero"`
	LatencySeconds float64 `json:"latency_seconds,omitzero"` // moving average of a signature
}

// Status is what operators see of a signer.
type Status struct {
	Time   time.Time     `json:"time"`
	Clock  ClockStatus   `json:"clock"`
	Agents []AgentStatus `json:"agents"`
}

// ClockStatus is what is known of the signer's clock.
type ClockStatus struct {
	*scope.Clock        // nil: nothing
	Jump         string `json:"jump,omitzero"`  // that it was set: all but cancels are refused
	Error        string `json:"error,omitzero"` // why nothing is known
}

// AgentStatus is what operators see of an agent.
type AgentStatus struct {
	AgentInfo
	Device *DeviceStatus `json:"device,omitzero"`
	// Rollback says what the record is bound to.
	Rollback audit.Anchoring `json:"rollback"`
	Error    string          `json:"error,omitzero"` // why it signs nothing now

	Reserve *ReserveStatus `json:"reserve,omitzero"` // nil: there is none

	PolicyError string `json:"policy_error,omitzero"` // why the policy file was not taken over
}

// ReserveStatus is what operators see of an agent's reserve.
type ReserveStatus struct {
	Until time.Time `json:"until,omitzero"`  // end of the consent; absent: there is none
	InUse bool      `json:"in_use,omitzero"` // no approver answers: actions are signed with the reserve's key
}

// info is what the agent itself may see.
func (a *Agent) info(ctx context.Context) (*AgentInfo, error) {
	c := a.current.Load()
	if c == nil {
		return nil, &scope.Refusal{Rule: RuleNoCertificate, Message: "the agent has no certificate yet"}
	}
	usage, err := a.log.Usage(ctx, c.scope)
	if err != nil {
		return nil, err
	}
	controls, err := a.log.Controls(ctx, c.scope)
	if err != nil {
		return nil, err
	}
	var text strings.Builder
	for _, crt := range c.chain {
		_ = pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: crt.Raw}) // a Builder takes everything
	}
	return &AgentInfo{Name: a.name, ID: c.action.Agent, Certificate: text.String(), NotAfter: c.chain[0].NotAfter.UTC(),
		Scope: string(c.scope.Canonical()), Description: c.scope.Describe(), Entries: a.log.Head().Size, Utilisation: usage, Controls: *controls}, nil
}

// status of all agents, in the order of the configuration.
func (s *Signer) status(ctx context.Context) *Status {
	out := &Status{Time: time.Now().UTC(), Agents: []AgentStatus{}}
	state, jump, why := s.clock.Now()
	if out.Clock.Clock = state; jump != nil {
		out.Clock.Jump = jump.String()
	}
	if why != nil {
		out.Clock.Error = why.Error()
	}
	for _, ac := range s.config.Agents {
		a := s.agents[ac.Name]
		var x AgentStatus
		info, err := a.info(ctx)
		if err != nil {
			x.AgentInfo, x.Error = AgentInfo{Name: a.name, Entries: a.log.Head().Size}, err.Error()
		} else if x.AgentInfo = *info; time.Now().After(info.NotAfter) {
			x.Error = "the certificate has expired: see the signer's log for why it was not renewed"
		}
		if x.Rollback = a.log.Anchoring(); x.Rollback.Finding != nil {
			x.Error = "the record may not be all that was recorded: " + x.Rollback.Finding.Found
		}
		if e := a.policyError.Load(); e != nil && *e != nil {
			x.PolicyError = (*e).Error()
		}
		if a.reserve.Load() != nil {
			x.Reserve = &ReserveStatus{Until: a.reserves.Until().UTC(), InUse: a.onReserve()}
		}
		if a.device != nil {
			d := a.device()
			x.Device = &d
		}
		out.Agents = append(out.Agents, x)
	}
	return out
}

// statusCollector gives Prometheus what the status has.
type statusCollector struct{ signer *Signer }

var (
	agentLabel = []string{"agent"}

	limitRatio       = prometheus.NewDesc("inkan_signer_limit_used_ratio", "what is used of a limit over time, from 0 to 1", []string{"agent", "limit", "key", "window"}, nil)
	killsInForce     = prometheus.NewDesc("inkan_signer_kills", "kills in force: above 0 only cancels pass, at a venue or at all", agentLabel, nil)
	policyEnds       = prometheus.NewDesc("inkan_signer_policy_expires_seconds", "end of the policy in effect, in seconds since 1970; then only cancels pass", agentLabel, nil)
	policyVersion    = prometheus.NewDesc("inkan_signer_policy_version", "version of the policy in effect", agentLabel, nil)
	workerGeneration = prometheus.NewDesc("inkan_signer_token_generation", "worker processes started for the agent's token", agentLabel, nil)
	workerUp         = prometheus.NewDesc("inkan_signer_token_worker_up", "1 if the worker process of the agent's token runs", agentLabel, nil)
	breakerOpen      = prometheus.NewDesc("inkan_signer_token_breaker_open", "1 if calls of the agent's token are refused at once", agentLabel, nil)
	tokenFailures    = prometheus.NewDesc("inkan_signer_token_failures_total", "calls of the agent's token that failed, those included that a second try made good", agentLabel, nil)
	clockDivergence  = prometheus.NewDesc("inkan_signer_clock_divergence_seconds", "how far the clock is from UTC at most; absent while that is not known", nil, nil)
	clockSet         = prometheus.NewDesc("inkan_signer_clock_jump", "1 if all but cancels are refused since the clock was set", nil, nil)
	recordFound      = prometheus.NewDesc("inkan_signer_record_refused", "1 if everything is refused since the agent's record may not be all that was recorded", agentLabel, nil)
	tokenLatency     = prometheus.NewDesc("inkan_signer_token_latency_seconds", "moving average of a signature of the agent's token", agentLabel, nil)
)

func (c *statusCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{limitRatio, killsInForce, policyEnds, policyVersion, workerGeneration, workerUp, breakerOpen, tokenFailures, tokenLatency, recordFound, clockDivergence, clockSet} {
		ch <- d
	}
}

func (c *statusCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	bit := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	status := c.signer.status(ctx)
	// A limit of the agent and one of algorithms may have one window, and an algorithm no name.
	type limit struct {
		rule        scope.Rule
		key, window string
	}
	ch <- prometheus.MustNewConstMetric(clockSet, prometheus.GaugeValue, bit(status.Clock.Jump != ""))
	if d := status.Clock.Clock; d != nil {
		ch <- prometheus.MustNewConstMetric(clockDivergence, prometheus.GaugeValue, float64(d.Divergence)/1e6)
	}
	for _, a := range status.Agents {
		if a.ID != "" { // otherwise it is not known what is in force
			ch <- prometheus.MustNewConstMetric(killsInForce, prometheus.GaugeValue, float64(len(a.Controls.Kills)), a.Name)
		}
		if p := a.Controls.Policy; p != nil {
			ch <- prometheus.MustNewConstMetric(policyEnds, prometheus.GaugeValue, float64(p.Expires.Unix()), a.Name)
			ch <- prometheus.MustNewConstMetric(policyVersion, prometheus.GaugeValue, float64(p.Version), a.Name)
		}
		used := make(map[limit]float64)
		for _, u := range a.Utilisation {
			l := limit{u.Limit, u.Key, u.Window.String()}
			used[l] = max(used[l], u.Ratio())
		}
		for l, ratio := range used {
			ch <- prometheus.MustNewConstMetric(limitRatio, prometheus.GaugeValue, ratio, a.Name, string(l.rule), l.key, l.window)
		}
		if a.Rollback.Bound {
			ch <- prometheus.MustNewConstMetric(recordFound, prometheus.GaugeValue, bit(a.Rollback.Finding != nil), a.Name)
		}
		if d := a.Device; d != nil && d.Kind == "pkcs11" {
			ch <- prometheus.MustNewConstMetric(workerGeneration, prometheus.GaugeValue, float64(d.Generation), a.Name)
			ch <- prometheus.MustNewConstMetric(workerUp, prometheus.GaugeValue, bit(d.WorkerPID != 0), a.Name)
			ch <- prometheus.MustNewConstMetric(breakerOpen, prometheus.GaugeValue, bit(d.Breaker == "open"), a.Name)
			ch <- prometheus.MustNewConstMetric(tokenFailures, prometheus.CounterValue, float64(d.Failures), a.Name)
			ch <- prometheus.MustNewConstMetric(tokenLatency, prometheus.GaugeValue, d.LatencySeconds, a.Name)
		}
	}
}
