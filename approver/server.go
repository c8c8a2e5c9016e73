package approver

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"inkan/attest"
	"inkan/internal/postgres"
	"inkan/internal/problem"
	"inkan/scope"
	"inkan/verify/source"
)

//go:embed openapi.json
var openAPI []byte

// Addresses are where an approver listens.
type Addresses struct {
	Signers string `json:"signers"`
	Metrics string `json:"metrics,omitempty"`
}

// Info is what an approver says of itself.
type Info struct {
	Approver    string `json:"approver"` // its key, as attest.ApproverID names it
	TrustDomain string `json:"trust_domain"`
}

// Serve serves signers over TLS 1.3 until ctx ends, then finishes what is under
// way. ready is called when it listens. A client must have a TLS certificate of the CA.
func (a *Approver) Serve(ctx context.Context, ready func(Addresses)) error {
	pair := func() (*tls.Certificate, error) {
		c, err := tls.LoadX509KeyPair(a.config.Certificate, a.config.CertificateKey)
		return &c, err
	}
	if _, err := pair(); err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	l, err := net.Listen("tcp", a.config.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	at := Addresses{Signers: l.Addr().String()}
	server := &http.Server{
		Handler: a.handler(), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 10 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelWarn),
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.roots,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair() },
		},
	}
	servers, errs := []*http.Server{server}, make(chan error, 2)
	if a.config.MetricsListen != "" {
		m := &http.Server{Handler: a.metrics.handler(), ReadHeaderTimeout: 10 * time.Second}
		ml, err := net.Listen("tcp", a.config.MetricsListen)
		if err != nil {
			return errors.Join(fmt.Errorf("metrics_listen: %w", err), l.Close())
		}
		at.Metrics = ml.Addr().String()
		servers = append(servers, m)
		go func() { errs <- m.Serve(ml) }()
	}
	go func() { errs <- server.ServeTLS(l, "", "") }()
	ready(at)
	select {
	case <-ctx.Done():
	case err = <-errs:
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	for _, x := range servers {
		err = errors.Join(err, x.Shutdown(stop))
	}
	return err
}

func (a *Approver) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/authorizations", func(w http.ResponseWriter, r *http.Request) {
		a.answer(w, r, forStatement, func(client *x509.Certificate, q *Request) (any, error) {
			x, err := a.Decide(r.Context(), client, q)
			if err == nil {
				a.metrics.authorized.WithLabelValues(client.Subject.CommonName).Inc()
			}
			return x, err
		})
	})
	mux.HandleFunc("POST /v1/consents", func(w http.ResponseWriter, r *http.Request) {
		a.answer(w, r, ParseConsentRequest, func(client *x509.Certificate, q *Request) (any, error) {
			x, err := a.Consent(r.Context(), client, q)
			if err == nil {
				a.metrics.consents.WithLabelValues(client.Subject.CommonName).Inc()
			}
			return x, err
		})
	})
	mux.HandleFunc("POST /v1/entries", func(w http.ResponseWriter, r *http.Request) {
		a.answer(w, r, entriesAlone, func(client *x509.Certificate, q *Request) (any, error) {
			return struct{}{}, a.Append(r.Context(), client, q)
		})
	})
	mux.HandleFunc("GET /v1/approver", func(w http.ResponseWriter, _ *http.Request) {
		id, err := attest.ApproverID(a.key.Public().(*ecdsa.PublicKey)) // New has seen that it is one
		if err != nil {
			problem.Write(w, problem.Problem{Status: http.StatusInternalServerError})
			return
		}
		problem.JSON(w, http.StatusOK, Info{id, a.config.TrustDomain})
	})
	mux.HandleFunc("GET /openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(openAPI) // the client may be gone
	})
	return mux
}

func forStatement(b []byte) (*Request, error) { return ParseRequest(b, true) }
func entriesAlone(b []byte) (*Request, error) { return ParseRequest(b, false) }

func (a *Approver) answer(w http.ResponseWriter, r *http.Request, parse func([]byte) (*Request, error), f func(*x509.Certificate, *Request) (any, error)) {
	begun := time.Now()
	defer func() {
		a.metrics.seconds.Observe(time.Since(begun).Seconds())
		if p := recover(); p != nil {
			a.fail(w, r, fmt.Errorf("panic: %v", p))
		}
	}()
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		a.fail(w, r, refuse(RuleClient, "a TLS client certificate is needed"))
		return
	}
	leave, ok := a.enter(r)
	if !ok {
		problem.Write(w, problem.Problem{Status: http.StatusTooManyRequests, Detail: fmt.Sprintf("more than %d requests at a time, and none ended for %s", atATime, postgres.Patience)})
		return
	}
	defer leave()
	body, err := io.ReadAll(io.LimitReader(r.Body, MaxRequest+1))
	if err != nil {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Detail: "the request's body could not be read"})
		return
	}
	q, err := parse(body)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	// No header counts: the TLS client proves who it is, so nothing that ends TLS
	// can stand between. What is not known is refused where it counts.
	q.From, _ = source.Peer(r.RemoteAddr)
	out, err := f(r.TLS.VerifiedChains[0][0], q)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	problem.JSON(w, http.StatusOK, out)
}

// atATime is how many requests of one agent are read and decided at a time. A
// body takes some of the memory that all agents share.
const atATime = 8

// enter waits for a place among the requests of the same agent. Those who are
// no agents here share the places of one.
func (a *Approver) enter(r *http.Request) (leave func(), ok bool) {
	place := a.places[""]
	if list := r.TLS.VerifiedChains[0][0].URIs; len(list) == 1 && a.places[list[0].String()] != nil {
		place = a.places[list[0].String()]
	}
	late := time.NewTimer(postgres.Patience)
	defer late.Stop()
	select {
	case place <- struct{}{}:
		return func() { <-place }, true
	case <-late.C:
	case <-r.Context().Done():
	}
	return nil, false
}

// fail answers with a refusal or an error; either is in the log.
func (a *Approver) fail(w http.ResponseWriter, r *http.Request, err error) {
	refusal, ok := errors.AsType[*scope.Refusal](err)
	if !ok {
		a.log.ErrorContext(r.Context(), "request failed", "error", err)
		problem.Write(w, problem.Problem{Status: http.StatusInternalServerError, Detail: "the approver could not do it; its log says why"})
		return
	}
	status := http.StatusForbidden
	switch refusal.Rule {
	case scope.RuleForm:
		status = http.StatusBadRequest
	case RuleGap:
		status = http.StatusConflict
	case RuleRecord, RuleKey, RuleRevocation, RuleKillState:
		status = http.StatusServiceUnavailable
	case RuleClient, RuleRevoked:
		w.Header().Set("Connection", "close") // the next one is made with the certificate that the agent has by then
	}
	who := ""
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		who = r.TLS.VerifiedChains[0][0].Subject.CommonName
	}
	a.metrics.refused.WithLabelValues(string(refusal.Rule)).Inc()
	if refusal.Rule != RuleGap { // that one is how a signer asks what is missing
		attributes := []any{"agent", who, "rule", refusal.Rule, "detail", refusal.Message}
		if refusal.Cause != nil {
			attributes = append(attributes, "cause", refusal.Cause)
		}
		a.log.WarnContext(r.Context(), "refused", attributes...)
	}
	problem.Write(w, problem.Problem{Status: status, Title: "authorization refused", Detail: refusal.Message, Rule: string(refusal.Rule), Field: refusal.Field, Value: refusal.Value, Limit: refusal.Limit, Excess: refusal.Excess})
}
