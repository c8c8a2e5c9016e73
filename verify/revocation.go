package verify

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"golang.org/x/crypto/ocsp"
)

// Revocation says whether a certificate was revoked: nil, or a *Refusal with
// ReasonRevoked, or any other error when it is not known freshly enough.
// Implementations are safe for concurrent use.
type Revocation interface {
	Check(ctx context.Context, c, issuer *x509.Certificate, now time.Time) error
}

// NoRevocation goes without: for tests, and where certificates live for
// minutes.
type NoRevocation struct{}

// Check accepts every certificate.
func (NoRevocation) Check(context.Context, *x509.Certificate, *x509.Certificate, time.Time) error {
	return nil
}

// maxCRL bounds a revocation list, in bytes.
const maxCRL = 16 << 20

func revoked(c *x509.Certificate, at time.Time) error {
	return refuse(ReasonRevoked, "the certificate %x was revoked at %s", c.SerialNumber, at.UTC().Format(time.RFC3339))
}

// CRL checks against a revocation list that Load gets: from a file or by HTTP.
type CRL struct {
	Load   func(ctx context.Context) ([]byte, error)
	MaxAge time.Duration // since its thisUpdate; besides, its nextUpdate must not have passed
	// Reload is after what time the list is got again, to see new revocations; 0 is a
	// tenth of MaxAge.
	Reload time.Duration

	renewal renewal
	list    *x509.RevocationList
	signer  []byte // whose list it is: the issuer's SubjectPublicKeyInfo
	set     map[string]time.Time
}

// Check implements Revocation.
func (l *CRL) Check(ctx context.Context, c, issuer *x509.Certificate, now time.Time) error {
	l.renewal.mu.Lock()
	defer l.renewal.mu.Unlock()
	reload := l.Reload
	if reload == 0 {
		reload = l.MaxAge / 10
	}
	another := l.list != nil && !bytes.Equal(l.signer, issuer.RawSubjectPublicKeyInfo)
	if !another && (l.list == nil || now.Sub(l.renewal.loaded) > reload) {
		l.renewal.due(ctx, l.list != nil && !l.old(now), now, func(ctx context.Context) (func() error, error) {
			list, err := l.get(ctx, issuer)
			return func() error { return l.place(list, issuer) }, err
		})
	}
	switch {
	case l.list == nil:
		return fmt.Errorf("there is no revocation list: %w", cmp.Or(l.renewal.err, errUnderWay))
	case !bytes.Equal(l.signer, issuer.RawSubjectPublicKeyInfo) || !bytes.Equal(l.list.RawIssuer, issuer.RawSubject):
		return errors.New("the revocation list is of another CA")
	case l.old(now):
		return fmt.Errorf("the revocation list is from %s, at most %s old is accepted (%v)", l.list.ThisUpdate.UTC().Format(time.RFC3339), l.MaxAge, l.renewal.err)
	}
	if at, ok := l.set[string(c.SerialNumber.Bytes())]; ok {
		return revoked(c, at)
	}
	return nil
}

// errUnderWay is that a list was not there when the request could wait no longer.
var errUnderWay = errors.New("its source has not answered yet")

func (l *CRL) old(now time.Time) bool {
	return now.After(l.list.NextUpdate) || now.Sub(l.list.ThisUpdate) > l.MaxAge
}

// place puts a list that was got into the place of the one before. If none is got the one
// that is there serves until it is too old.
func (l *CRL) place(list *x509.RevocationList, issuer *x509.Certificate) error {
	if l.list != nil && list.Number != nil && l.list.Number != nil && list.Number.Cmp(l.list.Number) < 0 {
		return errors.New("the revocation list is older than the one before")
	}
	l.list, l.signer, l.set = list, issuer.RawSubjectPublicKeyInfo, make(map[string]time.Time, len(list.RevokedCertificateEntries))
	for _, e := range list.RevokedCertificateEntries {
		l.set[string(e.SerialNumber.Bytes())] = e.RevocationTime
	}
	return nil
}

func (l *CRL) get(ctx context.Context, issuer *x509.Certificate) (*x509.RevocationList, error) {
	der, err := l.Load(ctx)
	if err != nil {
		return nil, err
	}
	if len(der) > maxCRL {
		return nil, errors.New("the revocation list is too large")
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, err
	}
	return list, list.CheckSignatureFrom(issuer)
}

// HTTPLoader gets a document from a URL that the operator chose, never one that
// a certificate names.
func HTTPLoader(url string) func(context.Context) ([]byte, error) {
	client := &http.Client{Timeout: 10 * time.Second}
	return func(ctx context.Context) ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return nil, err
		}
		return answer(client, req)
	}
}

func answer(client *http.Client, req *http.Request) ([]byte, error) {
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answered %s", req.URL, res.Status)
	}
	return io.ReadAll(io.LimitReader(res.Body, maxCRL+1))
}

// OCSP asks a responder (RFC 6960) and remembers its answer for at most MaxAge.
type OCSP struct {
	URL    string // that the operator chose
	MaxAge time.Duration

	mu    sync.Mutex
	known map[string]*ocsp.Response // by issuer's key and serial number
}

// Check implements Revocation.
func (o *OCSP) Check(ctx context.Context, c, issuer *x509.Certificate, now time.Time) error {
	serial := string(issuer.RawSubjectPublicKeyInfo) + string(c.SerialNumber.Bytes())
	o.mu.Lock()
	r := o.known[serial]
	o.mu.Unlock()
	if r == nil || now.Sub(r.ThisUpdate) > o.MaxAge || now.After(r.NextUpdate) {
		var err error
		if r, err = o.ask(ctx, c, issuer); err != nil {
			return err
		}
		o.mu.Lock()
		if o.known == nil || len(o.known) > maxKnown {
			o.known = make(map[string]*ocsp.Response)
		}
		o.known[serial] = r
		o.mu.Unlock()
	}
	switch {
	case r.Status == ocsp.Revoked:
		return revoked(c, r.RevokedAt)
	case r.Status != ocsp.Good:
		return errors.New("the OCSP responder does not know the certificate")
	case now.Sub(r.ThisUpdate) > o.MaxAge || now.After(r.NextUpdate) || r.ThisUpdate.After(now.Add(time.Minute)):
		return fmt.Errorf("the OCSP answer is from %s, at most %s old is accepted", r.ThisUpdate.UTC().Format(time.RFC3339), o.MaxAge)
	}
	return nil
}

func (o *OCSP) ask(ctx context.Context, c, issuer *x509.Certificate) (*ocsp.Response, error) {
	q, err := ocsp.CreateRequest(c, issuer, nil)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, o.URL, bytes.NewReader(q))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/ocsp-request")
	b, err := answer(&http.Client{Timeout: 10 * time.Second}, req)
	if err != nil {
		return nil, err
	}
	r, err := ocsp.ParseResponseForCert(b, c, issuer)
	if err != nil {
		return nil, fmt.Errorf("the OCSP answer: %w", err)
	}
	// The library verifies the delegation's signature, not what it is for.
	if r.Certificate != nil && !r.Certificate.Equal(issuer) {
		ok := false
		for _, u := range r.Certificate.ExtKeyUsage {
			ok = ok || u == x509.ExtKeyUsageOCSPSigning
		}
		if !ok {
			return nil, errors.New("the OCSP answer is signed by a certificate that is not for that")
		}
	}
	return r, nil
}
