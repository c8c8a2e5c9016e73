package verify

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"inkan/scope"
)

// Policies finds the policy that a statement names by the SHA-256 of its text.
// Implementations are safe for concurrent use.
type Policies interface {
	// Policy returns the policy's text, a JWS, or an error when it is not known.
	Policy(ctx context.Context, sum scope.Digest) (string, error)
}

// NoPolicies accepts actions that were decided under a policy without seeing it:
// then the signer is believed that the policy was held.
type NoPolicies struct{}

// Policy implements [Policies].
func (NoPolicies) Policy(context.Context, scope.Digest) (string, error) {
	return "", errors.New("policies are not looked at")
}

// PolicyDir finds policies among the files of a directory, whatever their names.
type PolicyDir struct {
	Path string

	mu    sync.Mutex
	known map[scope.Digest]string
	read  time.Time
}

// maxPolicyFiles bounds how many files of a directory are looked at.
const maxPolicyFiles = 4096

// Policy implements [Policies]. A policy that is not known makes it read the directory
// again, once a second.
func (d *PolicyDir) Policy(_ context.Context, sum scope.Digest) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if text, ok := d.known[sum]; ok {
		return text, nil
	}
	if time.Since(d.read) > time.Second {
		d.read = time.Now()
		if err := d.load(); err != nil {
			return "", err
		}
	}
	text, ok := d.known[sum]
	if !ok {
		return "", errors.New("no file has it")
	}
	return text, nil
}

func (d *PolicyDir) load() error {
	list, err := os.ReadDir(d.Path)
	if err != nil {
		return err
	}
	if len(list) > maxPolicyFiles {
		return fmt.Errorf("%s has more than %d files", d.Path, maxPolicyFiles)
	}
	known := make(map[scope.Digest]string)
	for _, e := range list {
		if !e.Type().IsRegular() {
			continue
		}
		f, err := os.Open(filepath.Join(d.Path, e.Name()))
		if err != nil {
			return err
		}
		b, err := io.ReadAll(io.LimitReader(f, scope.MaxEvent+2))
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		if text := strings.TrimSuffix(string(b), "\n"); len(text) <= scope.MaxEvent {
			known[sha256.Sum256([]byte(text))] = text
		}
	}
	d.known = known
	return nil
}

// PolicyURL finds a policy by HTTP, at a base URL that the operator chose and the
// policy's SHA-256 in base64url.
type PolicyURL string

// Policy implements [Policies].
func (u PolicyURL) Policy(ctx context.Context, sum scope.Digest) (string, error) {
	b, err := HTTPLoader(strings.TrimSuffix(string(u), "/") + "/" + base64.RawURLEncoding.EncodeToString(sum[:]))(ctx)
	if err != nil {
		return "", err
	}
	text := strings.TrimSuffix(string(b), "\n")
	if scope.Digest(sha256.Sum256([]byte(text))) != sum {
		return "", errors.New("what is there is another text")
	}
	return text, nil
}

// narrowings are policies that were verified, each with what it leaves of a certificate's scope.
type narrowings struct {
	mu   sync.Mutex
	list map[[2]scope.Digest]*narrowing
}

type narrowing struct {
	policy *scope.Policy
	scope  *scope.Scope
}

// maxNarrowings bounds how many are remembered.
const maxNarrowings = 1024

// policy checks the policy that a statement names (11), and the action against it (12).
func (r *Receiver) policy(ctx context.Context, cred *credential, st *scope.Statement, env scope.Env) error {
	if st.Decision.Policy == nil {
		return nil
	}
	if _, ok := r.c.Policies.(NoPolicies); ok {
		return nil
	}
	sum := *st.Decision.Policy
	n, err := r.narrow(ctx, cred, sum)
	if err != nil {
		name := base64.RawURLEncoding.EncodeToString(sum[:])
		if unknown, ok := errors.AsType[*unknownPolicy](err); ok {
			return &Refusal{Reason: ReasonPolicy, Detail: fmt.Sprintf("the policy %s is not known here; the action is not used up: send it again when the venue has the policy", name), Cause: unknown.cause}
		}
		return refuse(ReasonPolicy, "the policy %s: %v", name, err)
	}
	if refusal := n.policy.Holds(st.Agent, st.Time.Time); refusal != nil {
		return refuse(ReasonPolicy, "%v", refusal)
	}
	if _, err := scope.Check(n.scope, st.Action(), env); err != nil {
		return refuse(ReasonScope, "outside the policy: %v", err)
	}
	return nil
}

// unknownPolicy is that the source of policies gave none.
type unknownPolicy struct{ cause error }

func (u *unknownPolicy) Error() string { return "it is not known: " + u.cause.Error() }

func (r *Receiver) narrow(ctx context.Context, cred *credential, sum scope.Digest) (*narrowing, error) {
	key := [2]scope.Digest{sum, cred.scope.Hash()}
	r.narrowed.mu.Lock()
	n := r.narrowed.list[key]
	r.narrowed.mu.Unlock()
	if n != nil {
		return n, nil
	}
	if r.c.Policies == nil {
		return nil, errors.New("this receiver has no source of policies")
	}
	text, err := r.c.Policies.Policy(ctx, sum)
	if err != nil {
		return nil, &unknownPolicy{err}
	}
	n = &narrowing{}
	if n.policy, err = scope.ParsePolicy(text); err != nil {
		return nil, err
	}
	if n.policy.Hash() != sum {
		return nil, errors.New("it is another text")
	}
	var refusal *scope.Refusal
	if n.scope, refusal = n.policy.Within(cred.scope); refusal != nil {
		return nil, refusal
	}
	r.narrowed.mu.Lock()
	defer r.narrowed.mu.Unlock()
	if len(r.narrowed.list) >= maxNarrowings || r.narrowed.list == nil {
		r.narrowed.list = make(map[[2]scope.Digest]*narrowing)
	}
	r.narrowed.list[key] = n
	return n, nil
}

// Kills says whether an agent is stopped at a venue: nil, a *Refusal with
// ReasonKilled, or any other error when it is not known freshly enough.
// Implementations are safe for concurrent use.
type Kills interface {
	Check(ctx context.Context, agent, venue string, issuer *x509.Certificate, now time.Time) error
}

// KillList checks against the issuer's list of kills, which Load gets: from a file or by HTTP.
type KillList struct {
	Load   func(ctx context.Context) ([]byte, error)
	MaxAge time.Duration // since its this_update; besides, its next_update must not have passed
	Reload time.Duration // after what time it is got again, to see new kills; 0 is a tenth of MaxAge

	renewal renewal
	list    *scope.KillList
	signer  []byte // whose list it is: the issuer's SubjectPublicKeyInfo
}

// Check implements [Kills].
func (l *KillList) Check(ctx context.Context, agent, venue string, issuer *x509.Certificate, now time.Time) error {
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
		return fmt.Errorf("there is no kill list: %w", cmp.Or(l.renewal.err, errUnderWay))
	case !bytes.Equal(l.signer, issuer.RawSubjectPublicKeyInfo):
		return errors.New("the kill list is of another CA")
	case l.old(now):
		return fmt.Errorf("the kill list is from %s, at most %s old is accepted (%v)", l.list.ThisUpdate.UTC().Format(time.RFC3339), l.MaxAge, l.renewal.err)
	}
	for i := range l.list.Kills {
		if k := &l.list.Kills[i]; k.Stops(agent) && (k.Scope != scope.KillVenue || k.Venue == venue) {
			return refuse(ReasonKilled, "stopped since %s: %s", k.Since.UTC().Format(time.RFC3339), k.Reason)
		}
	}
	return nil
}

func (l *KillList) old(now time.Time) bool {
	return now.After(l.list.NextUpdate) || now.Sub(l.list.ThisUpdate) > l.MaxAge
}

func (l *KillList) get(ctx context.Context, issuer *x509.Certificate) (*scope.KillList, error) {
	b, err := l.Load(ctx)
	if err != nil {
		return nil, err
	}
	return scope.ParseKillList(strings.TrimSuffix(string(b), "\n"), issuer.PublicKey)
}

// place puts a list that was got into the place of the one before.
func (l *KillList) place(list *scope.KillList, issuer *x509.Certificate) error {
	if l.list != nil && list.Number < l.list.Number {
		return errors.New("the kill list is older than the one before")
	}
	l.list, l.signer = list, issuer.RawSubjectPublicKeyInfo
	return nil
}

// killed applies check 15. Cancels pass.
func (r *Receiver) killed(ctx context.Context, cred *credential, st *scope.Statement, now time.Time) error {
	if r.c.Kills == nil || st.Kind.ReducesRisk() {
		return nil
	}
	err := r.c.Kills.Check(ctx, st.Agent, st.Audience, cred.issuer, now)
	if err == nil {
		return nil
	}
	if refusal, ok := errors.AsType[*Refusal](err); ok {
		return refusal
	}
	return own(ReasonKillState, err)
}
