package issuer

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ocsp"
)

// Reasons are the reasons for a revocation (RFC 5280, section 5.3.1).
var Reasons = map[string]int{
	"unspecified": 0, "keyCompromise": 1, "affiliationChanged": 3, "superseded": 4, "cessationOfOperation": 5, "privilegeWithdrawn": 9,
}

func reasonName(code int) string {
	for name, c := range Reasons {
		if c == code {
			return name
		}
	}
	return fmt.Sprint(code)
}

const certificateColumns = "serial, profile, agent, der, issued, not_after, revoked, reason"

func scanCertificate(row interface{ Scan(...any) error }) (*Certificate, error) {
	var c Certificate
	var issued, notAfter int64
	var revoked, reason sql.NullInt64
	if err := row.Scan(&c.Serial, &c.Profile, &c.Agent, &c.der, &issued, &notAfter, &revoked, &reason); err != nil {
		return nil, err
	}
	c.Issued, c.NotAfter = time.Unix(issued, 0).UTC(), time.Unix(notAfter, 0).UTC()
	if revoked.Valid {
		c.Revoked, c.Reason = time.Unix(revoked.Int64, 0).UTC(), reasonName(int(reason.Int64))
	}
	return &c, nil
}

func (s *store) certificates(ctx context.Context, agent string) ([]*Certificate, error) {
	return list(ctx, s.db, func(r *sql.Rows) (*Certificate, error) { return scanCertificate(r) },
		"SELECT "+certificateColumns+" FROM certificate WHERE ? IN ('', agent) ORDER BY issued DESC LIMIT 1000", agent)
}

func (s *store) certificate(ctx context.Context, serial string) (*Certificate, error) {
	return certificateIn(ctx, s.db, serial)
}

// uncompromised applies K8 to a key.
func uncompromised(ctx context.Context, tx *sql.Tx, key crypto.PublicKey) error {
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return err
	}
	rows, err := tx.QueryContext(ctx, "SELECT der FROM certificate WHERE revoked IS NOT NULL AND reason = ?", keyCompromise)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var der []byte
		if err := rows.Scan(&der); err != nil {
			return err
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		if bytes.Equal(c.RawSubjectPublicKeyInfo, spki) {
			return refuse("K8", "the certificate %x of this key was revoked since the key was compromised: another key is needed", c.SerialNumber)
		}
	}
	return rows.Err()
}

func certificateIn(ctx context.Context, q queryer, serial string) (*Certificate, error) {
	c, err := scanCertificate(q.QueryRowContext(ctx, "SELECT "+certificateColumns+" FROM certificate WHERE serial = ?", serial))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("certificate %.80q: %w", serial, ErrNotFound)
	}
	return c, err
}

// keyCompromise is the reason for which a key is not certified again (K8).
const keyCompromise = 1

// revoke revokes a certificate. One that is revoked stays so, with its first
// reason, unless its key turns out to be compromised.
func (i *Issuer) revoke(ctx context.Context, serial, reason string) error {
	code, ok := Reasons[reason]
	if !ok {
		return fmt.Errorf("reason %.32q: %w: one of RFC 5280 is expected, such as keyCompromise", reason, ErrInvalid)
	}
	now := i.now()
	serial = strings.ToLower(serial) // openssl shows capitals
	err := i.store.inTx(ctx, func(tx *sql.Tx) error {
		c, err := certificateIn(ctx, tx, serial)
		if err != nil {
			return err
		}
		if !c.Revoked.IsZero() && (code != keyCompromise || Reasons[c.Reason] == keyCompromise) {
			return fmt.Errorf("certificate %s: %w: it was revoked at %s: %s", serial, ErrInvalid, c.Revoked.Format(time.RFC3339), c.Reason)
		}
		if _, err := tx.ExecContext(ctx, "UPDATE certificate SET revoked = coalesce(revoked, ?), reason = ? WHERE serial = ?", now.Unix(), code, serial); err != nil {
			return err
		}
		return event(ctx, tx, Event{Time: now, Kind: "revoked", Agent: c.Agent, Detail: fmt.Sprintf("%s certificate %s: %s", c.Profile, serial, reason)})
	})
	i.forgetCRL()
	return err
}

func (i *Issuer) forgetCRL() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.crl = nil
}

// CRL returns the revocation list in DER. It is made anew after a revocation
// and in time before its next update.
func (i *Issuer) CRL(ctx context.Context) ([]byte, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := i.now()
	if i.crl != nil && now.Before(i.crlUntil) && !now.Before(i.crlMade) {
		return i.crl, nil
	}
	// Expired certificates may leave the list (RFC 5280, section 3.3); a day more
	// is kept for receivers whose clocks are behind.
	revoked, err := list(ctx, i.store.db, func(r *sql.Rows) (*Certificate, error) { return scanCertificate(r) },
		"SELECT "+certificateColumns+" FROM certificate WHERE revoked IS NOT NULL AND not_after > ?", now.Add(-24*time.Hour).Unix())
	if err != nil {
		return nil, err
	}
	t := &x509.RevocationList{Number: big.NewInt(i.number(ctx, now)), ThisUpdate: now.Truncate(time.Second), NextUpdate: now.Add(i.config.crlLifetime).Truncate(time.Second)}
	for _, c := range revoked {
		serial, ok := new(big.Int).SetString(c.Serial, 16)
		if !ok {
			return nil, fmt.Errorf("serial number %q in the inventory is not hex", c.Serial)
		}
		t.RevokedCertificateEntries = append(t.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: serial, RevocationTime: c.Revoked, ReasonCode: Reasons[c.Reason]})
	}
	der, err := x509.CreateRevocationList(rand.Reader, t, i.ca, i.key)
	if err != nil {
		return nil, fmt.Errorf("signing the CRL: %w", err)
	}
	i.crl, i.crlMade, i.crlUntil = der, now, now.Add(i.config.crlLifetime/2)
	return der, nil
}

// numberReserve is how far ahead numbers of lists are reserved on disk.
const numberReserve = time.Hour

// number returns a number for a list that is greater than those of all lists
// before it, whatever the clock does and over restarts: receivers and signers refuse a
// list with a lower one. It is called with i.mu held.
func (i *Issuer) number(ctx context.Context, now time.Time) int64 {
	i.lastNumber = max(i.lastNumber+1, now.UnixMicro())
	if ahead := i.lastNumber + numberReserve.Microseconds(); i.lastNumber > i.reserved {
		if err := i.store.reserve(context.WithoutCancel(ctx), ahead); err != nil {
			// A list that may have to be numbered anew after a restart is better than none.
			i.log.ErrorContext(ctx, "the numbers of lists cannot be kept", "error", err)
		} else {
			i.reserved = ahead
		}
	}
	return i.lastNumber
}

// Lifetimes of what the servers make for themselves.
const (
	serverLifetime = 30 * 24 * time.Hour
	ocspLifetime   = 7 * 24 * time.Hour
)

// ephemeral is a certificate of the issuer's own for a key in memory, made anew
// when a third of its life is left.
type ephemeral struct {
	mu    sync.Mutex
	key   *ecdsa.PrivateKey
	crt   *x509.Certificate
	until time.Time
}

func (e *ephemeral) get(ctx context.Context, i *Issuer, o order) (*ecdsa.PrivateKey, *x509.Certificate, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := i.now()
	alive := e.crt != nil && now.After(e.crt.NotBefore) && now.Before(e.crt.NotAfter)
	if alive && now.Before(e.until) {
		return e.key, e.crt, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	o.key = &key.PublicKey
	crt, err := i.issue(ctx, o)
	switch {
	case err != nil && alive: // a third of its life is left to mend what is wrong
		i.log.ErrorContext(ctx, "a certificate of the issuer's own cannot be renewed", "profile", o.profile, "until", e.crt.NotAfter, "error", err)
		return e.key, e.crt, nil
	case err != nil:
		return nil, nil, err
	}
	e.key, e.crt, e.until = key, crt, i.renewal(crt)
	return key, crt, nil
}

type serverCertificate struct {
	issuer *Issuer
	ephemeral
}

func (s *serverCertificate) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	i := s.issuer
	key, crt, err := s.get(context.Background(), i, order{profile: profileServer, names: i.config.ServerNames, common: "inkan issuer", lifetime: serverLifetime})
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{crt.Raw}, PrivateKey: crypto.Signer(key), Leaf: crt}, nil
}

type responder struct {
	issuer *Issuer
	ephemeral
}

// respond answers an OCSP request (RFC 6960). A serial number that was never
// issued is unknown.
func (r *responder) respond(ctx context.Context, request []byte) ([]byte, error) {
	i := r.issuer
	q, err := ocsp.ParseRequest(request)
	if err != nil || !q.HashAlgorithm.Available() || !i.asked(q) {
		return ocsp.MalformedRequestErrorResponse, nil
	}
	key, crt, err := r.get(ctx, i, order{profile: profileOCSP, common: "inkan OCSP responder", lifetime: ocspLifetime})
	if err != nil {
		return nil, err
	}
	now := i.now()
	t := ocsp.Response{Status: ocsp.Good, SerialNumber: q.SerialNumber, ThisUpdate: now, NextUpdate: now.Add(i.config.crlLifetime), Certificate: crt, IssuerHash: q.HashAlgorithm}
	c, err := i.store.certificate(ctx, hex.EncodeToString(q.SerialNumber.Bytes()))
	switch {
	case errors.Is(err, ErrNotFound):
		t.Status = ocsp.Unknown
	case err != nil:
		return nil, err
	case !c.Revoked.IsZero():
		t.Status, t.RevokedAt, t.RevocationReason = ocsp.Revoked, c.Revoked, Reasons[c.Reason]
	}
	return ocsp.CreateResponse(i.ca, crt, t, key)
}

// asked says whether the request is about this CA.
func (i *Issuer) asked(q *ocsp.Request) bool {
	// The library makes requests from certificates: one for the CA's own
	// certificate has the hashes that name it as an issuer.
	own, err := ocsp.CreateRequest(i.ca, i.ca, &ocsp.RequestOptions{Hash: q.HashAlgorithm})
	if err != nil {
		return false
	}
	o, err := ocsp.ParseRequest(own)
	return err == nil && bytes.Equal(o.IssuerNameHash, q.IssuerNameHash) && bytes.Equal(o.IssuerKeyHash, q.IssuerKeyHash)
}

func pool(list []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range list {
		p.AddCert(c)
	}
	return p
}
