// Package wire is mutual TLS with an agent's TLS key, which stays in the
// device: [Open] an [Identity] from the state that the signer keeps, then
// [Identity.Client] for HTTP, [Identity.Dial] for anything else over TLS.
//
// It connects to the destinations that the scope in the agent's certificate
// names, and to no other. The certificate is read again when the signer has
// renewed it: new connections use the new one, those under way go on. A session
// of TLS 1.3 is resumed where the server allows it, so that the device, which
// may be a slow one, is asked for a signature at a full handshake alone.
//
// The process needs the device, so this is for programs that are trusted with
// the agent's identity on the wire. An agent that is confined uses inkan proxy.
package wire

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"inkan/hsm"
	"inkan/internal/certext"
	"inkan/internal/keyuri"
	"inkan/journal"
	"inkan/scope"
	"inkan/tpm"
)

// Rules of this package, beside [scope.RuleDestinations]. docs/proxy.md lists them.
const (
	RuleNoCertificate scope.Rule = "no_certificate" // the agent has none that is valid
	RuleDevice        scope.Rule = "device"         // the device did not sign the handshake
	RuleTLS           scope.Rule = "tls"            // the server's certificate is not what it must be, or the server refuses the agent's
	RuleUnreachable   scope.Rule = "unreachable"    // there is no connection to the server
)

func refuse(rule scope.Rule, format string, a ...any) *scope.Refusal {
	return &scope.Refusal{Rule: rule, Message: fmt.Sprintf(format, a...)}
}

// failed is a refusal that lies with the host or the way to the server: what is said
// of it names nothing of the inside, and cause is for the log.
func failed(rule scope.Rule, cause error, format string, a ...any) *scope.Refusal {
	r := refuse(rule, format, a...)
	r.Cause = cause
	return r
}

// Files of an agent's state, as package signer writes them.
const (
	tlsChain    = "tls.pem"
	tlsKey      = "tls.tss2.pem"
	actionChain = "action.pem"
	policyFile  = "policies.json"
)

// Options say where an identity is.
type Options struct {
	Dir       string         // the agent's directory in the signer's state_dir
	Roots     *x509.CertPool // the issuer's CA, which the agent's certificates chain to
	TPM       string         // address of the TPM, for a key in it or a PIN that is sealed to it
	OwnerAuth []byte         // of the TPM's owner hierarchy, usually empty
	Key       string         // pkcs11: URI of the TLS key; empty: it is in the TPM
}

// Identity is an agent on the wire. It is safe for concurrent use.
type Identity struct {
	o      Options
	device *tpm.Device
	token  crypto.Signer    // nil: the key is in the TPM
	closer io.Closer        // of the token
	books  *journal.Journal // of what the TPM signs; nil: it does not audit that

	signed   atomic.Uint64
	looked   atomic.Int64 // when the files were last looked at, nanoseconds since 1970
	current  atomic.Pointer[generation]
	mu       sync.Mutex // one reload at a time; owns what follows
	files    [3]fileID
	key      *tpm.Key
	failed   error
	sessions tls.ClientSessionCache
	now      func() time.Time
}

// generation is what one set of certificates says.
type generation struct {
	n           uint64
	certificate tls.Certificate
	notAfter    time.Time // of the TLS certificate
	action      time.Time // end of the action certificate, whose scope counts
	agent       string    // SPIFFE ID
	scope       *scope.Scope
	config      *tls.Config // without server name and roots
}

// lookEvery bounds how often the files are looked at.
const lookEvery = 200 * time.Millisecond

// Open opens the key and reads the certificates. Close it.
func Open(o Options) (_ *Identity, err error) {
	if o.Roots == nil {
		return nil, errors.New("the issuer's CA is missing")
	}
	i := &Identity{o: o, sessions: tls.NewLRUClientSessionCache(256), now: time.Now}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.Close())
		}
	}()
	if o.TPM != "" {
		if i.device, err = tpm.OpenWith(o.TPM, tpm.Options{OwnerAuth: o.OwnerAuth}); err != nil {
			return nil, err
		}
	}
	if o.Key != "" {
		if i.token, i.closer, err = keyuri.OpenSealed(o.Key, i.unseal); err != nil {
			return nil, err
		}
	} else if i.device == nil {
		return nil, errors.New("neither a TPM nor a key in a token is named")
	} else if err = i.keepBooks(); err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	return i, i.reload()
}

// keepBooks writes handshakes to the host's journal of signatures, where its
// TPM audits them: else they would be missing there.
func (i *Identity) keepBooks() error {
	on, err := i.device.Auditing()
	if err != nil || !on {
		return err
	}
	if i.books, err = journal.Open(filepath.Join(filepath.Dir(i.o.Dir), journal.FileName)); err != nil {
		return err
	}
	return i.device.StartAudit(i.books)
}

// Close closes the device. Connections stay open.
func (i *Identity) Close() error {
	var errs []error
	if i.closer != nil {
		errs = append(errs, i.closer.Close())
	}
	if i.device != nil {
		errs = append(errs, i.device.Close())
	}
	if i.books != nil {
		errs = append(errs, i.books.Close())
	}
	return errors.Join(errs...)
}

// Pause ends processes that serve the key, for a process that confines itself;
// [Identity.Resume] starts them again, and then they are confined too.
func (i *Identity) Pause() {
	if t, ok := i.closer.(*hsm.Token); ok {
		t.EndWorker()
	}
}

// Resume says whether the key is there again.
func (i *Identity) Resume() error {
	if t, ok := i.closer.(*hsm.Token); ok {
		return t.StartWorker()
	}
	return nil
}

// Signatures returns how often the device has signed a handshake.
func (i *Identity) Signatures() uint64 { return i.signed.Load() }

// Agent returns the agent's SPIFFE ID.
func (i *Identity) Agent() string { return i.current.Load().agent }

// NotAfter returns when the TLS certificate ends, as far as it is known.
func (i *Identity) NotAfter() time.Time { return i.current.Load().notAfter }

// Scope returns the scope in the agent's current action certificate. The
// refusal says why there is none in force.
func (i *Identity) Scope() (*scope.Scope, error) {
	g, err := i.valid()
	if err != nil {
		return nil, err
	}
	return g.scope, nil
}

// valid returns the current certificates, if they are in force.
func (i *Identity) valid() (*generation, error) {
	now := i.now()
	if last := i.looked.Load(); now.UnixNano()-last >= int64(lookEvery) && i.looked.CompareAndSwap(last, now.UnixNano()) {
		i.look()
	}
	g := i.current.Load()
	for _, c := range []struct {
		what string
		end  time.Time
	}{{"TLS", g.notAfter}, {"action", g.action}} {
		if now.After(c.end) {
			return nil, refuse(RuleNoCertificate, "the agent's %s certificate ended at %s: see the signer's log for why it was not renewed", c.what, c.end.UTC().Format(time.RFC3339))
		}
	}
	return g, nil
}

// look reads the certificates again if a file has changed. What is read and is not
// whole changes nothing: the signer may be about to write the rest.
func (i *Identity) look() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if files, err := i.stat(); err == nil && files != i.files {
		i.failed = i.reload()
	}
}

// Err returns why the files were not taken when they last changed; nil if they were.
func (i *Identity) Err() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.failed
}

// fileID is by what a change of a file is seen.
type fileID struct {
	size     int64
	modified time.Time
}

func (i *Identity) stat() (out [3]fileID, err error) {
	for n, name := range []string{tlsChain, actionChain, policyFile} {
		fi, err := os.Stat(filepath.Join(i.o.Dir, name))
		if err != nil {
			return out, err
		}
		out[n] = fileID{fi.Size(), fi.ModTime()}
	}
	return out, nil
}

// reload reads key and certificates. It is called with mu held.
func (i *Identity) reload() error {
	files, err := i.stat()
	if errors.Is(err, os.ErrNotExist) {
		return refuse(RuleNoCertificate, "the agent has no TLS certificate in %s: it is added with --tls or --tls-hsm, and its signer enrols it", i.o.Dir)
	}
	if err != nil {
		return err
	}
	chain, err := i.chain(tlsChain)
	if err != nil {
		return err
	}
	action, err := i.chain(actionChain)
	if err != nil {
		return err
	}
	leaf := chain[0]
	ac, err := certext.ParseAction(action[0])
	if err != nil {
		return fmt.Errorf("%s: %w", actionChain, err)
	}
	g := &generation{agent: ac.Agent, notAfter: leaf.NotAfter, action: action[0].NotAfter}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != ac.Agent {
		return fmt.Errorf("%s is not of %s, whose action certificate is beside it", tlsChain, ac.Agent)
	}
	if err := i.chains(chain, x509.ExtKeyUsageClientAuth); err != nil {
		return fmt.Errorf("%s: %w", tlsChain, err)
	}
	if err := i.chains(action, x509.ExtKeyUsageAny); err != nil {
		return fmt.Errorf("%s: %w", actionChain, err)
	}
	if g.scope, err = scope.ParseCanonical(ac.Scope); err != nil {
		return fmt.Errorf("%s: %w", actionChain, err)
	}
	key, err := i.signer(leaf)
	if err != nil {
		return err
	}
	g.certificate = tls.Certificate{PrivateKey: key, Leaf: leaf}
	for _, c := range chain {
		g.certificate.Certificate = append(g.certificate.Certificate, c.Raw)
	}
	if last := i.current.Load(); last != nil {
		g.n = last.n + 1
	}
	g.config = i.configOf(g)
	i.files = files
	i.current.Store(g)
	return nil
}

// chains checks that a chain leads to the issuer. Time is checked at each use.
func (i *Identity) chains(chain []*x509.Certificate, usage x509.ExtKeyUsage) error {
	leaf := *chain[0]
	leaf.UnhandledCriticalExtensions = nil // the scope, which certext has read
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: i.o.Roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}, CurrentTime: leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)})
	return err
}

func (i *Identity) chain(name string) ([]*x509.Certificate, error) {
	b, err := os.ReadFile(filepath.Join(i.o.Dir, name))
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s has no certificate", name)
	}
	return out, nil
}

// signer returns the key of a certificate.
func (i *Identity) signer(leaf *x509.Certificate) (crypto.Signer, error) {
	if i.token != nil {
		if !same(i.token, leaf) {
			return nil, fmt.Errorf("%s is not for the key in the token", tlsChain)
		}
		return i.token, nil
	}
	policies, err := i.policies()
	if err != nil {
		return nil, err
	}
	if i.key == nil || !same(i.key, leaf) { // the issuer may have asked for a new key
		file, err := os.ReadFile(filepath.Join(i.o.Dir, tlsKey))
		if err != nil {
			return nil, err
		}
		k, err := i.device.LoadKey(file, policies)
		if err != nil {
			return nil, err
		}
		if !same(k, leaf) {
			return nil, fmt.Errorf("%s is not for the key in %s", tlsChain, tlsKey)
		}
		i.key = k
	}
	i.key.SetPolicies(policies)
	return i.key, nil
}

func same(k crypto.Signer, leaf *x509.Certificate) bool {
	p, ok := k.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && p.Equal(leaf.PublicKey)
}

func (i *Identity) policies() (*tpm.Policies, error) {
	b, err := os.ReadFile(filepath.Join(i.o.Dir, policyFile))
	if err != nil {
		return nil, err
	}
	var p tpm.Policies
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, fmt.Errorf("%s: %w", policyFile, err)
	}
	return &p, nil
}

// unseal opens a PIN that was sealed to the TPM.
func (i *Identity) unseal(file []byte) ([]byte, error) {
	if i.device == nil {
		return nil, errors.New("the PIN is sealed to a TPM, and none is named")
	}
	p, err := i.policies()
	if err != nil {
		return nil, err
	}
	return i.device.Unseal(file, p)
}

// counted counts signatures, and keeps why the last one was not made: the TLS
// library passes on the text alone.
type counted struct {
	crypto.Signer
	n      *atomic.Uint64
	failed *error
}

// Sign implements crypto.Signer.
func (c *counted) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	c.n.Add(1)
	sig, err := c.Signer.Sign(r, digest, o)
	if c.failed != nil {
		*c.failed = err
	}
	return sig, err
}
