package issuer

import (
	"context"
	"crypto/tls"
	_ "embed"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/problem"
	"inkan/internal/strictjson"
)

//go:embed openapi/agent.json
var agentOpenAPI []byte

//go:embed openapi/admin.json
var adminOpenAPI []byte

// perAddress is how many exchanges one address may begin, or messages of an
// exchange that it did not begin may it send: a burst, then one every two seconds (G7). Renewal
// takes one in hours.
const (
	perAddressBurst = 60
	perAddressRate  = rate.Limit(0.5)
	maxAddresses    = 16384
)

// unlimited is for benchmarks alone.
var unlimited bool

// limiter bounds what one address costs before anything expensive is done.
type limiter struct {
	mu    sync.Mutex
	rate  rate.Limit
	burst int
	by    map[netip.Prefix]*rate.Limiter
}

func (l *limiter) allow(remote string) bool {
	from, err := netip.ParseAddrPort(remote)
	if err != nil {
		return false
	}
	// Who has one IPv6 address has the rest of its network, too.
	network := netip.PrefixFrom(from.Addr().Unmap(), 32)
	if network.Addr().Is6() {
		network = netip.PrefixFrom(network.Addr().WithZone(""), 64).Masked()
	}
	if unlimited {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.by == nil || len(l.by) > maxAddresses {
		l.by = make(map[netip.Prefix]*rate.Limiter) // forgetting is cheaper than being filled up
	}
	r := l.by[network]
	if r == nil {
		r = rate.NewLimiter(l.rate, l.burst)
		l.by[network] = r
	}
	return r.Allow()
}

// fail answers with the refusal or error, in words that give nothing away
// about causes inside.
func (i *Issuer) fail(w http.ResponseWriter, r *http.Request, err error) {
	if refusal, ok := errors.AsType[*attest.Refusal](err); ok {
		i.metrics.refused.WithLabelValues(refusal.Check).Inc()
		problem.Write(w, problem.Problem{Status: http.StatusForbidden, Title: "evidence refused", Detail: refusal.Detail, Check: refusal.Check})
		return
	}
	for target, status := range map[error]int{ErrNotFound: http.StatusNotFound, ErrExists: http.StatusConflict, ErrInvalid: http.StatusUnprocessableEntity} {
		if errors.Is(err, target) {
			problem.Write(w, problem.Problem{Status: status, Detail: err.Error()})
			return
		}
	}
	if bad, ok := errors.AsType[*badRequest](err); ok {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Detail: bad.Error()})
		return
	}
	i.log.ErrorContext(r.Context(), "request failed", "path", r.URL.Path, "error", err)
	problem.Write(w, problem.Problem{Status: http.StatusInternalServerError, Detail: "the issuer could not do it; its log says why"})
}

type badRequest struct{ err error }

func (b *badRequest) Error() string { return b.err.Error() }

// read decodes a request's body.
func read(r *http.Request, v any) error {
	b, err := io.ReadAll(io.LimitReader(r.Body, maxRequest+1))
	if err != nil {
		return &badRequest{err}
	}
	if err := strictjson.Unmarshal(b, maxRequest, v); err != nil {
		return &badRequest{err}
	}
	return nil
}

// guard turns a panic into a refusal (G1, G2).
func (i *Issuer) guard(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if p := recover(); p != nil {
				i.fail(w, r, fmt.Errorf("panic: %v", p))
			}
		}()
		h.ServeHTTP(w, r)
	})
}

func static(contentType string, b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		_, _ = w.Write(b) // the client may be gone
	}
}

// agentHandler serves the agents' API.
func (i *Issuer) agentHandler() http.Handler {
	mux := http.NewServeMux()
	// allow refuses what an address sends beyond its limit, and writes nothing
	// down of it: the decision log must not fill up.
	allow := func(w http.ResponseWriter, r *http.Request) bool {
		if i.limit.allow(r.RemoteAddr) {
			return true
		}
		i.metrics.refused.WithLabelValues("G7").Inc()
		w.Header().Set("Retry-After", "2")
		problem.Write(w, problem.Problem{Status: http.StatusTooManyRequests, Check: "G7", Detail: "too many exchanges from this address"})
		return false
	}
	mux.HandleFunc("POST /v1/sessions", func(w http.ResponseWriter, r *http.Request) {
		if !allow(w, r) {
			return
		}
		var h attest.Hello
		if err := read(r, &h); err != nil {
			i.fail(w, r, err)
			return
		}
		who := party{agent: h.Agent}
		c, err := i.begin(r.Context(), &h, peer(r), &who)
		if err != nil {
			i.decide(w, r, who, nil, err)
			return
		}
		problem.JSON(w, http.StatusOK, c)
	})
	mux.HandleFunc("POST /v1/sessions/{session}/journal", func(w http.ResponseWriter, r *http.Request) {
		id, err := hex.DecodeString(r.PathValue("session"))
		if who, known := i.sessions.who(i.now(), id); err == nil && known || allow(w, r) {
			i.serveJournal(w, r, who)
		}
	})
	mux.HandleFunc("POST /v1/sessions/evidence", func(w http.ResponseWriter, r *http.Request) {
		var ev attest.Evidence
		if err := read(r, &ev); err != nil {
			i.fail(w, r, err)
			return
		}
		who, known := i.sessions.who(i.now(), ev.Session)
		if !known && !allow(w, r) {
			return
		}
		binding, err := r.TLS.ExportKeyingMaterial(attest.BindingLabel, nil, attest.BindingSize)
		if err != nil {
			i.fail(w, r, err)
			return
		}
		begun := time.Now()
		g, err := i.finish(r.Context(), &ev, binding, peer(r))
		if err != nil {
			kept := &ev
			if !known {
				kept = nil // it answers nothing that was asked
			}
			i.decide(w, r, who, kept, err)
			return
		}
		i.metrics.issued.Inc()
		i.metrics.appraisal.Observe(time.Since(begun).Seconds())
		problem.JSON(w, http.StatusOK, g)
	})
	mux.HandleFunc("POST /v1/declarations", func(w http.ResponseWriter, r *http.Request) {
		if !allow(w, r) {
			return
		}
		var x attest.Declaration
		if err := read(r, &x); err != nil {
			i.fail(w, r, err)
			return
		}
		binding, err := r.TLS.ExportKeyingMaterial(attest.BindingLabel, nil, attest.BindingSize)
		if err != nil {
			i.fail(w, r, err)
			return
		}
		g, err := i.declared(r.Context(), &x, binding, peer(r))
		if err != nil {
			i.decide(w, r, party{agent: x.Agent}, nil, err)
			return
		}
		i.metrics.issued.Inc()
		problem.JSON(w, http.StatusOK, g)
	})
	mux.HandleFunc("GET /v1/kills", i.serveKills)
	mux.HandleFunc("GET /openapi.json", static("application/json", agentOpenAPI))
	return i.guard(mux)
}

// decide logs a refusal durably, then answers with it.
func (i *Issuer) decide(w http.ResponseWriter, r *http.Request, who party, ev *attest.Evidence, err error) {
	if refusal, ok := errors.AsType[*attest.Refusal](err); ok {
		i.log.WarnContext(r.Context(), "evidence refused", "agent", clip(who.agent, 64), "device", who.device, "check", refusal.Check, "detail", refusal.Detail, "remote", r.RemoteAddr)
		if logErr := i.refused(context.WithoutCancel(r.Context()), who, ev, refusal); logErr != nil { // of who hangs up, too
			err = logErr
		}
	}
	i.fail(w, r, err)
}

// serveKills serves the signed kill list.
func (i *Issuer) serveKills(w http.ResponseWriter, r *http.Request) {
	text, err := i.KillList(r.Context())
	if err != nil {
		i.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/jose")
	_, _ = io.WriteString(w, text+"\n") // the client may be gone
}

// adminHandler serves the administrators' API. Every request is asked for an
// administrator's certificate, whatever the listener did (G3).
func (i *Issuer) adminHandler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			v, err := f(r)
			if err != nil {
				i.fail(w, r, err)
				return
			}
			if v == nil {
				v = struct{}{}
			}
			problem.JSON(w, http.StatusOK, v)
		})
	}
	handle("GET /v1/devices", func(r *http.Request) (any, error) { return i.store.devices(r.Context()) })
	handle("POST /v1/devices", func(r *http.Request) (any, error) {
		var d Device
		if err := read(r, &d); err != nil {
			return nil, err
		}
		return nil, i.store.addDevice(r.Context(), d, i.now())
	})
	handle("POST /v1/devices/{id}/epoch", func(r *http.Request) (any, error) {
		var e attest.EpochDemand
		if err := read(r, &e); err != nil {
			return nil, err
		}
		return nil, i.store.setEpoch(r.Context(), r.PathValue("id"), e.AtLeast, i.now())
	})
	handle("DELETE /v1/devices/{id}/testimony", func(r *http.Request) (any, error) {
		return nil, i.store.resetAudit(r.Context(), r.PathValue("id"), i.now())
	})
	handle("DELETE /v1/devices/{id}", func(r *http.Request) (any, error) {
		return nil, i.store.removeDevice(r.Context(), r.PathValue("id"), i.now())
	})
	handle("GET /v1/agents", func(r *http.Request) (any, error) { return i.store.agents(r.Context()) })
	handle("POST /v1/agents", func(r *http.Request) (any, error) {
		var a Agent
		if err := read(r, &a); err != nil {
			return nil, err
		}
		return nil, i.store.addAgent(r.Context(), a, i.now())
	})
	handle("POST /v1/agents/{name}/status", func(r *http.Request) (any, error) {
		var s struct {
			Status string `json:"status"`
		}
		if err := read(r, &s); err != nil {
			return nil, err
		}
		defer i.forgetCRL()
		return nil, i.store.setStatus(r.Context(), r.PathValue("name"), s.Status, i.now())
	})
	handle("GET /v1/policies", func(r *http.Request) (any, error) { return i.store.policies(r.Context()) })
	handle("POST /v1/policies", func(r *http.Request) (any, error) {
		var p Policy
		if err := read(r, &p); err != nil {
			return nil, err
		}
		if err := attest.VerifyPolicy(i.policyKey, i.policyRef, &p.Approved); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		if p.Device != "*" && !validID(p.Device) {
			return nil, fmt.Errorf("device %.80q: %w: a device id or * is expected", p.Device, ErrInvalid)
		}
		if p.Device == "*" && p.Approved.Epoch > 0 {
			return nil, fmt.Errorf("policy %s: %w: an approval with an epoch is for one device: each TPM counts by itself", p.Approved.Name, ErrInvalid)
		}
		return nil, i.store.addPolicy(r.Context(), p, i.now())
	})
	handle("POST /v1/policies/{name}/retire", func(r *http.Request) (any, error) {
		return nil, i.store.retirePolicy(r.Context(), r.PathValue("name"), i.now())
	})
	handle("GET /v1/certificates", func(r *http.Request) (any, error) {
		return i.store.certificates(r.Context(), r.URL.Query().Get("agent"))
	})
	handle("POST /v1/certificates/{serial}/revoke", func(r *http.Request) (any, error) {
		var s struct {
			Reason string `json:"reason"`
		}
		if err := read(r, &s); err != nil {
			return nil, err
		}
		return nil, i.revoke(r.Context(), r.PathValue("serial"), s.Reason)
	})
	handle("GET /v1/kills", func(r *http.Request) (any, error) { return i.store.kills(r.Context()) })
	handle("POST /v1/kills", func(r *http.Request) (any, error) {
		var o KillOrder
		if err := read(r, &o); err != nil {
			return nil, err
		}
		return i.addKill(r.Context(), o)
	})
	handle("DELETE /v1/kills/{id}", func(r *http.Request) (any, error) { return nil, i.liftKill(r.Context(), r.PathValue("id")) })
	handle("GET /v1/events", func(r *http.Request) (any, error) {
		after, limit := int64(0), 1000
		var err error
		if s := r.URL.Query().Get("after"); s != "" {
			if after, err = strconv.ParseInt(s, 10, 64); err != nil {
				return nil, &badRequest{fmt.Errorf("after=%.32s: a number is expected", s)}
			}
		}
		return i.store.events(r.Context(), after, limit)
	})
	mux.HandleFunc("GET /openapi.json", static("application/json", adminOpenAPI))
	return i.guard(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		refused := func(detail string) {
			i.metrics.refused.WithLabelValues("G3").Inc()
			i.log.WarnContext(r.Context(), "not an administrator", "path", clip(r.URL.Path, 256), "detail", detail, "remote", r.RemoteAddr)
			problem.Write(w, problem.Problem{Status: http.StatusForbidden, Check: "G3", Detail: detail})
		}
		if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || !certext.IsAdministrator(r.TLS.PeerCertificates[0]) {
			refused("an administrator's certificate is needed")
			return
		}
		admin := r.TLS.PeerCertificates[0]
		c, err := i.store.certificate(r.Context(), serialText(admin.SerialNumber))
		if err != nil || !c.Revoked.IsZero() || i.now().After(c.NotAfter) {
			refused("the administrator's certificate is revoked or over, or was not issued here")
			return
		}
		mux.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), byKey{}, admin.Subject.CommonName)))
	}))
}

// publicHandler serves what receivers need: CA certificate, CRL and OCSP.
func (i *Issuer) publicHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ca.pem", static("application/x-pem-file", certificatePEM(i.ca.Raw)))
	mux.HandleFunc("GET /ca.cer", static("application/pkix-cert", i.ca.Raw))
	mux.HandleFunc("GET /crl", func(w http.ResponseWriter, r *http.Request) {
		der, err := i.CRL(r.Context())
		if err != nil {
			i.fail(w, r, err)
			return
		}
		w.Header().Set("Content-Type", "application/pkix-crl")
		_, _ = w.Write(der) // the client may be gone
	})
	mux.HandleFunc("GET /kills", i.serveKills)
	answer := func(w http.ResponseWriter, r *http.Request, request []byte) {
		der, err := i.ocsp.respond(r.Context(), request)
		if err != nil {
			i.fail(w, r, err)
			return
		}
		w.Header().Set("Content-Type", "application/ocsp-response")
		_, _ = w.Write(der) // the client may be gone
	}
	mux.HandleFunc("POST /ocsp", func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(io.LimitReader(r.Body, 4<<10))
		if err != nil {
			i.fail(w, r, &badRequest{err})
			return
		}
		answer(w, r, b)
	})
	mux.HandleFunc("GET /ocsp/{request...}", func(w http.ResponseWriter, r *http.Request) { // RFC 6960, appendix A.1
		text, err := url.PathUnescape(r.PathValue("request"))
		b, err2 := base64.StdEncoding.DecodeString(text)
		if err != nil || err2 != nil || len(b) > 4<<10 {
			i.fail(w, r, &badRequest{errors.New("an OCSP request in base64 is expected")})
			return
		}
		answer(w, r, b)
	})
	return i.guard(mux)
}

// Addresses are where an issuer listens.
type Addresses struct {
	Agent   string `json:"agent"`
	Admin   string `json:"admin"`
	Public  string `json:"public"`
	Metrics string `json:"metrics,omitempty"`
}

// Serve serves all interfaces until ctx ends, then finishes what is under way.
// ready is told where it listens.
func (i *Issuer) Serve(ctx context.Context, ready func(Addresses)) error {
	var listeners []net.Listener
	listen := func(setting, address string) (net.Listener, error) {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", setting, err)
		}
		listeners = append(listeners, l)
		return l, nil
	}
	closeAll := func() {
		for _, l := range listeners {
			_ = l.Close()
		}
	}
	base := &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: i.server.GetCertificate, SessionTicketsDisabled: true, NextProtos: []string{"http/1.1"}}
	admin := base.Clone()
	admin.ClientAuth, admin.ClientCAs = tls.RequireAndVerifyClientCert, pool(certs(i.ca))
	handlers := []struct {
		setting, address string

		handler http.Handler
		tls     *tls.Config
		listen  net.Listener
	}{
		{"agent_listen", i.config.AgentListen, i.agentHandler(), base, nil},
		{"admin_listen", i.config.AdminListen, i.adminHandler(), admin, nil},
		{"public_listen", i.config.PublicListen, i.publicHandler(), nil, nil},
		{"metrics_listen", i.config.MetricsListen, i.metrics.handler(), nil, nil},
	}
	errs := make(chan error, len(handlers))
	var servers []*http.Server
	for n := range handlers {
		h := &handlers[n]
		if h.address == "" {
			continue
		}
		l, err := listen(h.setting, h.address)
		if err != nil {
			closeAll()
			return err
		}
		h.listen = l
		if h.tls != nil {
			l = tls.NewListener(l, h.tls)
		}
		s := &http.Server{Handler: h.handler, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second,
			IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(i.log.Handler(), slog.LevelWarn)}
		servers = append(servers, s)
		go func() { errs <- s.Serve(l) }()
	}
	address := func(n int) string {
		if handlers[n].listen == nil {
			return ""
		}
		return handlers[n].listen.Addr().String()
	}
	ready(Addresses{address(0), address(1), address(2), address(3)})
	var err error
	select {
	case <-ctx.Done():
	case err = <-errs:
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	for _, s := range servers {
		err = errors.Join(err, s.Shutdown(stop))
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
