package gate

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"inkan/verify"
)

// Headers that the backend gets from the gate, and from nobody else.
const (
	HeaderAgent       = "Agent-Id"                 // SPIFFE ID
	HeaderActionID    = "Agent-Action-Id"          // the action's id
	HeaderKind        = "Agent-Action-Kind"        // order.new and so on
	HeaderCounter     = "Agent-Action-Counter"     // position in the agent's record
	HeaderCertificate = "Agent-Certificate-Sha256" // of the action certificate, hex
	HeaderScopeHash   = "Agent-Scope-Sha256"       // of the scope's canonical JSON, hex
	HeaderScope       = "Agent-Scope"              // with ForwardScope: the canonical JSON, base64url
)

// DefaultHeaders are the request headers that pass. It is a list of what
// passes, and not of what does not: a backend may read Agent_Id as Agent-Id, or obey
// X-HTTP-Method-Override, and no list has all of those.
var DefaultHeaders = []string{"Accept", "Accept-Language", "Content-Type", "Traceparent", "Tracestate", "User-Agent"}

// passing returns the names of headers that pass, in canonical form.
func passing(more []string) ([]string, error) {
	names := slices.Clone(DefaultHeaders)
	for _, n := range more {
		name := textproto.CanonicalMIMEHeaderKey(n)
		// As a backend may read it.
		read := strings.ReplaceAll(strings.ToLower(name), "_", "-")
		switch {
		case strings.HasPrefix(read, "agent-") || strings.HasPrefix(read, "x-forwarded-") || read == "forwarded":
			return nil, fmt.Errorf("config of headers: %q is the gate's to set", n)
		case slices.Contains([]string{"", "connection", "content-encoding", "content-length", "expect", "host", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}, read):
			return nil, fmt.Errorf("config of headers: %q belongs to the connection", n)
		}
		names = append(names, name)
	}
	return names, nil
}

func validBackend(u *url.URL, plain bool) error {
	if u == nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.RawPath != "" {
		return errors.New("the backend is not a URL such as https://backend:8443, without user, query and fragment")
	}
	switch u.Scheme {
	case "https":
		return nil
	case "http":
		a, err := netip.ParseAddr(u.Hostname())
		if plain || u.Hostname() == "localhost" || err == nil && a.IsLoopback() {
			return nil
		}
		return fmt.Errorf("backend: http to %s, which is not this host: use https", u.Host)
	}
	return fmt.Errorf("backend: %q is not http or https", u.Scheme)
}

func (g *Gate) reverseProxy() *httputil.ReverseProxy {
	transport := g.c.Transport
	if transport == nil {
		transport = &http.Transport{
			DialContext:         (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
			TLSHandshakeTimeout: 5 * time.Second,
			ForceAttemptHTTP2:   true,
			DisableCompression:  true,
			MaxIdleConnsPerHost: 64,
			IdleConnTimeout:     90 * time.Second,
		}
	}
	return &httputil.ReverseProxy{
		Transport: transport,
		Rewrite:   g.rewrite,
		ModifyResponse: func(res *http.Response) error {
			res.Header.Del("Alt-Svc") // a way around the gate
			return nil
		},
		ErrorHandler: g.backendFailed,
		ErrorLog:     slog.NewLogLogger(g.log.Handler(), slog.LevelWarn),
	}
}

// rewrite makes the backend's request: headers that pass, and those of the gate.
func (g *Gate) rewrite(p *httputil.ProxyRequest) {
	h := make(http.Header)
	for _, name := range g.headers {
		if v := p.In.Header[name]; len(v) > 0 {
			h[name] = v
		}
	}
	p.Out.Header, p.Out.Trailer = h, nil
	p.SetURL(g.c.Backend)
	// Both are there: accepted comes before.
	v, _ := verify.FromContext(p.In.Context())
	x := exchangeOf(p.In.Context())
	h.Set("X-Forwarded-For", x.peer.Address.String())
	h.Set("X-Forwarded-Proto", "https")
	h.Set(HeaderAgent, v.Agent)
	h.Set(HeaderActionID, v.Statement.ID)
	h.Set(HeaderKind, string(v.Action.Kind))
	h.Set(HeaderCounter, strconv.FormatUint(uint64(v.Statement.Counter), 10))
	h.Set(HeaderCertificate, hex.EncodeToString(v.Statement.Decision.Certificate[:]))
	hash := v.Scope.Hash()
	h.Set(HeaderScopeHash, hex.EncodeToString(hash[:]))
	if g.c.ForwardScope {
		h.Set(HeaderScope, base64.RawURLEncoding.EncodeToString(v.Scope.Canonical()))
	}
}

// backendFailed tells the agent what is known about an action that was used up.
func (g *Gate) backendFailed(w http.ResponseWriter, req *http.Request, err error) {
	detail := "the backend did not answer as expected; whether it acted is not known: ask the venue before you sign another"
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		detail = "the backend could not be reached; it did not get the action, which is used up: sign another"
	}
	exchangeOf(req.Context()).answer(w, &verify.Refusal{Reason: ReasonBackend, Detail: detail, Cause: err})
}
