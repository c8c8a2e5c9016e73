package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"inkan/internal/certext"
	"inkan/internal/jws"
	"inkan/scope"
)

// Report says what VerifyFile proved about a log.
type Report struct {
	Agent        string    `json:"agent"`
	Entries      uint64    `json:"entries"`
	Permits      uint64    `json:"permits"`
	Denials      uint64    `json:"denials"`
	Signed       uint64    `json:"signed"`       // permits whose signature stands in the log and verifies
	Unsigned     []uint64  `json:"unsigned"`     // counters of permits without one, the first hundred
	Certificates int       `json:"certificates"` // under which entries stand
	First        time.Time `json:"first,omitzero"`
	Last         time.Time `json:"last,omitzero"`
	Root         string    `json:"root"` // of the Merkle tree, hex
	Proves       []string  `json:"proves"`
	DoesNotProve []string  `json:"does_not_prove"`
}

// Unproven says which entry of a log does not verify, and why.
type Unproven struct {
	Counter uint64 // 0: the log as a whole
	Reason  string
}

func (u *Unproven) Error() string {
	if u.Counter == 0 {
		return "the record does not verify: " + u.Reason
	}
	return fmt.Sprintf("the record does not verify at entry %d: %s", u.Counter, u.Reason)
}

// VerifyFile checks a log file against the CA's roots. It reads a snapshot, so
// a signer may be writing. progress, if not nil, is told how far it is. Its
// error is an [*Unproven] when the record is wrong, and another one when it could not be read.
func VerifyFile(ctx context.Context, path string, roots *x509.CertPool, progress func(done, total uint64)) (*Report, error) {
	s, err := OpenSnapshot(ctx, path)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	v := &verification{roots: roots, report: &Report{Unsigned: []uint64{}}, certificates: make(map[scope.Digest]*certificate), started: make(map[scope.Run]string), book: scope.NewBook()}
	if v.stored, err = s.chains(ctx); err != nil {
		return nil, err
	}
	if v.starts, err = s.starts(ctx); err != nil {
		return nil, err
	}
	if err := v.run(ctx, s, progress); err != nil {
		return nil, err
	}
	return v.finish(s.Head)
}

// verification walks over a log once. Order, chain and tree are checked entry
// by entry; signatures and scopes on all cores beside it.
type verification struct {
	roots        *x509.CertPool
	stored       map[[32]byte][]byte
	starts       map[[32]byte][]byte           // start documents
	started      map[scope.Run]string          // those that were checked, and the agent of each
	certificates map[scope.Digest]*certificate // verified for form

	report   *Report
	previous [32]byte
	last     time.Time
	tree     []tlog.Hash // complete subtrees, the largest first
	book     *scope.Book // what is used of limits over time
}

type certificate struct {
	action *certext.ActionCertificate
	scope  *scope.Scope
	pool   *x509.CertPool
	alg    string
}

type task struct {
	entry     Entry
	statement *scope.Statement
	cert      *certificate
}

func (v *verification) run(ctx context.Context, s *Snapshot, progress func(done, total uint64)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	tasks := make(chan task, 256)
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for t := range tasks {
				if err := v.signed(t); err != nil {
					cancel(err)
				}
			}
		})
	}
	err := v.walk(ctx, s, tasks, progress)
	close(tasks)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause // the first fault found beside the walk
	}
	return err
}

func (v *verification) walk(ctx context.Context, s *Snapshot, tasks chan<- task, progress func(done, total uint64)) error {
	for e, err := range s.Entries(ctx) {
		if err != nil {
			return err
		}
		t, err := v.entry(e)
		if err != nil {
			return &Unproven{e.Counter, err.Error()}
		}
		select {
		case tasks <- t:
		case <-ctx.Done():
			return ctx.Err()
		}
		if progress != nil && (e.Counter%1024 == 0 || e.Counter == s.Head.Size) {
			progress(e.Counter, s.Head.Size)
		}
	}
	return nil
}

func (v *verification) entry(e Entry) (task, error) {
	r := v.report
	st, err := scope.ParseStatement(e.Statement)
	switch {
	case err != nil:
		return task{}, err
	case e.Counter != r.Entries+1:
		return task{}, fmt.Errorf("entry %d is expected here: entries are missing", r.Entries+1)
	case uint64(st.Counter) != e.Counter:
		return task{}, fmt.Errorf("the statement says it is number %d", st.Counter)
	case st.Previous != scope.Digest(v.previous):
		return task{}, errors.New("the statement names another predecessor")
	case st.Time.Time.Before(v.last):
		return task{}, errors.New("the statement is earlier than its predecessor")
	case r.Agent != "" && st.Agent != r.Agent:
		return task{}, fmt.Errorf("the statement is of another agent, %s", st.Agent)
	}
	r.Entries, r.Agent = e.Counter, st.Agent
	if r.First.IsZero() {
		r.First = st.Time.Time
	}
	v.previous, v.last = sha256.Sum256(e.Statement), st.Time.Time
	v.grow(e.Statement)
	cert, err := v.certificate(st.Decision.Certificate)
	if err != nil {
		return task{}, err
	}
	if err := v.start(st); err != nil {
		return task{}, err
	}
	if st.Decision.Decision == scope.DecisionDeny {
		r.Denials++
		if e.JWS != "" {
			return task{}, errors.New("a refusal has a signature")
		}
		return task{e, st, cert}, nil
	}
	r.Permits++
	use := scope.UseOfStatement(st)
	if refusal := v.book.Check(cert.scope, use); refusal != nil {
		return task{}, fmt.Errorf("it is out of scope: %w", refusal)
	}
	if got := v.book.Utilisation(cert.scope, use); !slices.Equal(got, st.Decision.Utilisation) {
		return task{}, errors.New("it states another utilisation of its limits than the entries before it lead to")
	}
	v.book.Add(use)
	if e.JWS == "" {
		if len(r.Unsigned) < 100 {
			r.Unsigned = append(r.Unsigned, e.Counter)
		}
	} else {
		r.Signed++
	}
	return task{e, st, cert}, nil
}

// start: what a statement says of the process that asked is what its start
// document in the record says.
func (v *verification) start(st *scope.Statement) error {
	if st.Run == nil || v.started[*st.Run] == st.Agent && st.Agent != "" {
		return nil
	}
	b, ok := v.starts[st.Run.Start]
	if !ok {
		return errors.New("its start document is not in the record")
	}
	d, err := scope.ParseStartDocument(b)
	if err != nil {
		return err
	}
	run, err := d.Run()
	if err != nil {
		return err
	}
	if *run != *st.Run || d.Agent != st.Agent {
		return errors.New("it says another thing of its start than the start document")
	}
	v.started[*st.Run] = st.Agent
	return nil
}

// grow adds a leaf to the tree: subtrees of equal size join (RFC 9162, section 2.1).
func (v *verification) grow(leaf []byte) {
	h := tlog.RecordHash(leaf)
	for n := v.report.Entries - 1; n&1 == 1; n >>= 1 {
		h = tlog.NodeHash(v.tree[len(v.tree)-1], h)
		v.tree = v.tree[:len(v.tree)-1]
	}
	v.tree = append(v.tree, h)
}

func (v *verification) root() tlog.Hash {
	if len(v.tree) == 0 {
		return tlog.Hash{}
	}
	h := v.tree[len(v.tree)-1]
	for i := len(v.tree) - 2; i >= 0; i-- {
		h = tlog.NodeHash(v.tree[i], h)
	}
	return h
}

func (v *verification) certificate(sum scope.Digest) (*certificate, error) {
	if c, ok := v.certificates[sum]; ok {
		return c, nil
	}
	der, ok := v.stored[[32]byte(sum)]
	if !ok {
		return nil, errors.New("its certificate is not in the record")
	}
	chain, err := x509.ParseCertificates(der)
	if err != nil || len(chain) == 0 || sha256.Sum256(chain[0].Raw) != [32]byte(sum) {
		return nil, errors.New("its certificate is not the one in the record")
	}
	c := &certificate{pool: x509.NewCertPool()}
	for _, i := range chain[1:] {
		c.pool.AddCert(i)
	}
	if c.action, err = certext.ParseAction(chain[0]); err != nil {
		return nil, fmt.Errorf("its certificate: %w", err)
	}
	if c.scope, err = scope.ParseCanonical(c.action.Scope); err != nil {
		return nil, fmt.Errorf("its certificate: %w", err)
	}
	if c.alg, _, err = jws.Algorithm(chain[0].PublicKey); err != nil {
		return nil, fmt.Errorf("its certificate: %w", err)
	}
	if _, err := c.action.VerifyChain(v.roots, c.pool, chain[0].NotBefore); err != nil {
		return nil, fmt.Errorf("its certificate does not chain to the CA: %w", err)
	}
	v.certificates[sum] = c
	return c, nil
}

// signed checks what does not depend on order: agent, scope, certificate at
// the statement's time, and the signature.
func (v *verification) signed(t task) error {
	fail := func(format string, a ...any) error {
		return &Unproven{t.entry.Counter, fmt.Sprintf(format, a...)}
	}
	st, c := t.statement, t.cert
	switch {
	case st.Agent != c.action.Agent:
		return fail("the statement is of %s, its certificate of %s", st.Agent, c.action.Agent)
	case [32]byte(st.Decision.Scope) != c.scope.Hash():
		return fail("the statement names another scope than its certificate")
	}
	if st.Decision.Decision == scope.DecisionDeny {
		return nil
	}
	crt := c.action.Certificate
	if at := st.Time.Time; at.Before(crt.NotBefore) || at.After(crt.NotAfter) {
		return fail("the statement is from %s, outside the life of its certificate", at.Format(time.RFC3339))
	}
	env := scope.Env{Now: st.Time.Time, AttestedAt: c.action.Attestation.Time, Reference: st.ReferencePrice(), Run: st.Run}
	permit, err := scope.Check(c.scope, st.Action(), env)
	if err != nil {
		return fail("it is out of scope: %v", err)
	}
	if !st.StatesNotional(permit) {
		return fail("it states another notional than its order has")
	}
	if t.entry.JWS == "" {
		return nil
	}
	m, err := jws.Split([]byte(t.entry.JWS))
	if err != nil {
		return fail("%v", err)
	}
	h, err := m.Header()
	if err != nil {
		return fail("%v", err)
	}
	if !bytes.Equal(m.Payload, t.entry.Statement) {
		return fail("what was signed is not the statement")
	}
	if h.Typ != jws.Type {
		return fail("the signature's typ is %.32q", h.Typ)
	}
	if err := jws.Verify(crt.PublicKey, h.Alg, m.SigningInput, m.Signature); err != nil {
		return fail("%v", err)
	}
	return nil
}

func (v *verification) finish(head Head) (*Report, error) {
	r := v.report
	root := v.root()
	switch {
	case r.Entries != head.Size:
		return nil, &Unproven{0, fmt.Sprintf("the head says %d entries, %d are there", head.Size, r.Entries)}
	case r.Entries > 0 && v.previous != head.Previous:
		return nil, &Unproven{0, "the last entry is not the one that the head names"}
	case r.Entries > 0 && root != tlog.Hash(head.Root):
		return nil, &Unproven{0, "the entries do not lead to the head's root"}
	}
	r.Last, r.Certificates = v.last, len(v.certificates)
	r.Root = fmt.Sprintf("%x", root[:])
	r.Proves = []string{
		"every entry is in its place: numbered without gaps, each naming its predecessor, times not going back",
		"every permit was inside the scope of a certificate of this CA that was valid at its time",
		"every stored signature is the certified key's, over exactly the entry",
	}
	r.DoesNotProve = []string{
		"that no entries followed the last one: compare with the latest signed action that a venue has, which names its number",
		"that a certificate was not revoked at the time: compare with the issuer's revocation list",
	}
	if n := r.Permits - r.Signed; n > 0 {
		r.DoesNotProve = append(r.DoesNotProve, fmt.Sprintf("who made the %d permits without a stored signature; a crash between record and reply leaves such entries", n))
	}
	return r, nil
}
