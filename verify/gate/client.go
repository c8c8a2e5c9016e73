package gate

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"inkan/verify"
)

// client is who a TLS connection is with.
type client struct {
	ID          string // SPIFFE ID
	Certificate *x509.Certificate
	Address     netip.Addr
}

// TLSConfig returns the configuration for a gate's listener: TLS 1.3, and a
// client certificate that has the form of an agent's.
func (g *Gate) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: g.c.GetCertificate,
		ClientAuth:     tls.RequireAndVerifyClientCert,
		ClientCAs:      g.c.ClientRoots,
		Time:           g.now,
		// Form only: it runs at each handshake, resumed ones too, and must not wait for
		// a revocation list. Requests check everything.
		VerifyConnection: func(s tls.ConnectionState) error {
			_, err := clientID(&s, g.c.TrustDomain)
			return err
		},
	}
}

// peer checks the client's certificate: form, time, revocation.
func (g *Gate) peer(req *http.Request) (*client, error) {
	if req.TLS == nil {
		return nil, refuse(ReasonClient, "the connection is not TLS")
	}
	id, err := clientID(req.TLS, g.c.TrustDomain)
	if err != nil {
		return nil, refuse(ReasonClient, "%v", err)
	}
	chain := req.TLS.VerifiedChains[0]
	c, now := chain[0], g.now()
	if now.Before(c.NotBefore) || now.After(c.NotAfter) {
		return nil, refuse(verify.ReasonExpired, "the TLS certificate is valid from %s to %s", c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
	}
	if err := g.c.ClientRevocation.Check(req.Context(), c, chain[1], now); err != nil {
		if r, ok := errors.AsType[*verify.Refusal](err); ok {
			return nil, &verify.Refusal{Reason: r.Reason, Detail: "TLS certificate: " + r.Detail, Cause: r.Cause}
		}
		return nil, &verify.Refusal{Reason: verify.ReasonRevocation, Detail: "TLS certificate: this gate cannot tell now whether it was revoked; the action is not used up: send it again before it expires", Cause: err}
	}
	address, err := netip.ParseAddrPort(req.RemoteAddr)
	if err != nil {
		return nil, refuse(ReasonNetwork, "the connection has no IP address")
	}
	return &client{ID: id, Certificate: c, Address: address.Addr().Unmap()}, nil
}

// clientID checks the form of a client's certificate, which the TLS stack
// verified, and returns its SPIFFE ID.
func clientID(s *tls.ConnectionState, domain string) (string, error) {
	if len(s.VerifiedChains) == 0 || len(s.VerifiedChains[0]) < 2 {
		return "", errors.New("no client certificate was verified")
	}
	c := s.VerifiedChains[0][0]
	// The rules for a leaf in X509-SVID, sections 2, 4.1 and 4.3. A certificate
	// without an extended key usage passes the TLS stack, so that is asked here.
	switch {
	case c.IsCA:
		return "", errors.New("the client certificate is that of a CA")
	case c.KeyUsage&x509.KeyUsageDigitalSignature == 0 || c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return "", errors.New("the client certificate's key usage is not that of a TLS client")
	case !slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) || len(c.UnknownExtKeyUsage) != 0:
		return "", errors.New("the client certificate's extended key usage is not that of a TLS client alone")
	case len(c.URIs) != 1:
		return "", fmt.Errorf("the client certificate has %d URIs, exactly one SPIFFE ID is expected", len(c.URIs))
	}
	id := c.URIs[0].String()
	return id, validID(id, domain)
}

// validID checks a SPIFFE ID (SPIFFE-ID, sections 2.1 to 2.3) of a workload in
// the trust domain.
func validID(id, domain string) error {
	if len(id) > 2048 {
		return errors.New("the SPIFFE ID is longer than 2048 bytes")
	}
	rest, ok := strings.CutPrefix(id, "spiffe://")
	if !ok {
		return fmt.Errorf("%.80q is not a SPIFFE ID", id)
	}
	got, path, ok := strings.Cut(rest, "/")
	if got != domain {
		return fmt.Errorf("%.80q is not of the trust domain %s", id, domain)
	}
	if !ok {
		return fmt.Errorf("%.80q names a trust domain, not an agent", id)
	}
	for segment := range strings.SplitSeq(path, "/") {
		if segment == "" || segment == "." || segment == ".." || strings.Trim(segment, idCharacters) != "" {
			return fmt.Errorf("%.80q has a path that a SPIFFE ID cannot have", id)
		}
	}
	return nil
}

const (
	domainCharacters = "abcdefghijklmnopqrstuvwxyz0123456789.-_"
	idCharacters     = domainCharacters + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
)

func validDomain(d string) error {
	if d == "" || len(d) > 255 || strings.Trim(d, domainCharacters) != "" {
		return fmt.Errorf("TrustDomain %.80q is not a trust domain such as example.org", d)
	}
	return nil
}

// admit checks agent and source network.
func (g *Gate) admit(p *client) error {
	if g.c.Agents == nil {
		return nil
	}
	networks, ok := g.c.Agents[p.ID]
	if !ok {
		return refuse(ReasonAgent, "%s may not come here", p.ID)
	}
	if len(networks) > 0 && !slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(p.Address) }) {
		return refuse(ReasonNetwork, "%s may not come from %s", p.ID, p.Address)
	}
	return nil
}

// peerBound refuses an action that is not the TLS peer's. It stands where the
// receiver asks about revocation: after the action's certificate was verified
// and before the action is used up, so that nobody can use up another's.
type peerBound struct{ verify.Revocation }

// Check implements verify.Revocation.
func (b peerBound) Check(ctx context.Context, c, issuer *x509.Certificate, now time.Time) error {
	x := exchangeOf(ctx)
	switch {
	case x == nil || x.peer == nil:
		return refuse(ReasonPeer, "the connection has no checked client")
	case len(c.URIs) != 1 || c.URIs[0].String() != x.peer.ID:
		return refuse(ReasonPeer, "the action is not of %s, whose connection this is", x.peer.ID)
	case bytes.Equal(c.RawSubjectPublicKeyInfo, x.peer.Certificate.RawSubjectPublicKeyInfo):
		return refuse(ReasonPeer, "one key serves for TLS and for actions, two are expected")
	}
	return b.Revocation.Check(ctx, c, issuer, now)
}
