/* Statements to output. Scopes as in Jinja: a loop's body and a macro have their own names, an if has not; what a loop sets
 * is gone after the round, but for attributes of a namespace. */
#include <string.h>

#include "coordinator/jinja_internal.h"

enum flow { FLOW_NEXT, FLOW_BREAK, FLOW_CONTINUE };

static enum flow exec_list(struct jj_render *r, const struct jj_node *list);

static void enter_frame(struct jj_render *r, struct jj_frame *f, struct jj_frame *up)
{
    f->up = up;
    f->names = jj_alloc(&r->job, sizeof *f->names);
    r->frame = f;
}

/* The names of a tuple, or one name. */
static void assign(struct jj_render *r, const struct jj_node *targets, struct jj_value v)
{
    size_t n = 0, i = 0;
    if (!targets->next) {
        jj_set_name(r, targets->name, v);
        return;
    }
    const struct jj_list *parts = jj_iterate(&r->job, &v);
    for (const struct jj_node *t = targets; t; t = t->next)
        n++;
    if (n != parts->n)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "%zu names for %zu values", n, parts->n);
    for (const struct jj_node *t = targets; t; t = t->next)
        jj_set_name(r, t->name, parts->v[i++]);
}

/* ---- for ---- */

/* Those for which the loop's `if` is true. */
static struct jj_list *filtered(struct jj_render *r, const struct jj_node *n, struct jj_list *all)
{
    struct jj_frame *outer = r->frame, frame;
    struct jj_list *kept = jj_list(&r->job, all->n).u.list;
    kept->n = 0;
    for (size_t i = 0; i < all->n; i++) {
        enter_frame(r, &frame, outer);
        assign(r, n->named, all->v[i]);
        struct jj_value keep = jj_eval(r, n->b);
        if (jj_truth(&r->job, &keep))
            kept->v[kept->n++] = all->v[i];
    }
    r->frame = outer;
    return kept;
}

static enum flow exec_for(struct jj_render *r, const struct jj_node *n)
{
    struct jj_frame *outer = r->frame, frame;
    struct jj_value over = jj_eval(r, n->a);
    struct jj_list *items = jj_iterate(&r->job, &over);
    struct jj_loop *loop = jj_alloc(&r->job, sizeof *loop);
    if (n->b)
        items = filtered(r, n, items);
    *loop = (struct jj_loop){.items = items};
    for (; loop->index < items->n; loop->index++) {
        enter_frame(r, &frame, outer);
        jj_set_name(r, (struct jj_str){"loop", 4}, (struct jj_value){.type = JJ_LOOP, .u.loop = loop});
        assign(r, n->named, items->v[loop->index]);
        if (exec_list(r, n->list) == FLOW_BREAK)
            break;
    }
    r->frame = outer;
    if (items->n > 0 || !n->other)
        return FLOW_NEXT;
    enter_frame(r, &frame, outer);
    enum flow flow = exec_list(r, n->other);
    r->frame = outer;
    return flow;
}

/* ---- what catches the output of a body ---- */

static struct jj_value captured(struct jj_render *r, const struct jj_node *list, enum flow *flow)
{
    struct jj_buf b = {.max = JINJA_MAX_OUTPUT_BYTES}, *out = r->out;
    r->out = &b;
    *flow = exec_list(r, list);
    r->out = out;
    return jj_buf_value(&b);
}

struct jj_value jj_call_macro(struct jj_render *r, const struct jj_callable *f, const struct jj_args *args)
{
    const struct jj_node *m = f->macro;
    struct jj_frame *caller = r->frame, frame;
    size_t i = 0, used = 0;
    enum flow flow;
    jj_enter(&r->job);
    enter_frame(r, &frame, r->top);
    for (const struct jj_node *p = m->named; p; p = p->next, i++) {
        struct jj_value none = {.type = JJ_CALLABLE}, v = none;
        for (size_t k = 0; k < args->n_kw; k++)
            if (jj_str_eq(args->kw[k].key, p->name)) {
                if (i < args->n)
                    jj_fail(&r->job, ST_INVALID_ARGUMENT, "macro %.*s: two values for \"%.*s\"", (int)m->name.n,
                            m->name.s, (int)p->name.n, p->name.s);
                v = args->kw[k].value;
                used++;
            }
        if (i < args->n)
            v = args->v[i];
        else if (v.type == JJ_CALLABLE && !v.u.call)
            v = p->a ? jj_eval(r, p->a) : jj_undefined(p->name.s, p->name.n);
        jj_set_name(r, p->name, v);
    }
    if (args->n > i || used < args->n_kw)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "macro %.*s: an argument that it does not take", (int)m->name.n,
                m->name.s);
    struct jj_value v = captured(r, m->list, &flow);
    r->frame = caller;
    r->job.depth--;
    return v;
}

static void define_macro(struct jj_render *r, const struct jj_node *n)
{
    struct jj_callable *f = jj_alloc(&r->job, sizeof *f);
    *f = (struct jj_callable){.name = n->name, .macro = n};
    jj_set_name(r, n->name, (struct jj_value){.type = JJ_CALLABLE, .u.call = f});
}

static void set_attribute(struct jj_render *r, const struct jj_node *n)
{
    struct jj_node name = {.kind = N_NAME, .line = n->line, .name = n->name};
    struct jj_value ns = jj_eval(r, &name), v = jj_eval(r, n->a);
    if (ns.type != JJ_NAMESPACE)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "\"%.*s\" is a %s: only attributes of a namespace can be set",
                (int)n->name.n, n->name.s, jj_type_name(&ns));
    jj_dict_set(&r->job, ns.u.dict, n->value.u.str, v);
}

static enum flow exec_with(struct jj_render *r, const struct jj_node *n)
{
    struct jj_frame *outer = r->frame, frame;
    struct jj_dict *names = jj_dict(&r->job).u.dict;
    for (const struct jj_node *a = n->named; a; a = a->next) /* all see the names outside */
        jj_dict_set(&r->job, names, a->name, jj_eval(r, a->a));
    enter_frame(r, &frame, outer);
    frame.names = names;
    enum flow flow = exec_list(r, n->list);
    r->frame = outer;
    return flow;
}

static enum flow exec_block(struct jj_render *r, const struct jj_node *n)
{
    struct jj_frame *outer = r->frame, frame;
    enum flow flow;
    enter_frame(r, &frame, outer);
    struct jj_value v = captured(r, n->list, &flow);
    r->frame = outer;
    if (n->a)
        v = jj_filter_apply(r, n->a, v);
    if (n->kind == N_SET_BLOCK)
        assign(r, n->named, v);
    else
        jj_put_str(&r->job, r->out, &v);
    return flow;
}

/* ---- all ---- */

static enum flow exec_one(struct jj_render *r, const struct jj_node *n)
{
    struct jj_value v;
    r->job.line = n->line;
    switch (n->kind) {
    case N_TEXT:
        jj_put(&r->job, r->out, n->name.s, n->name.n);
        return FLOW_NEXT;
    case N_PRINT:
        v = jj_eval(r, n->a);
        jj_put_str(&r->job, r->out, &v);
        return FLOW_NEXT;
    case N_FOR:
        return exec_for(r, n);
    case N_IF:
        v = jj_eval(r, n->a);
        return exec_list(r, jj_truth(&r->job, &v) ? n->list : n->other);
    case N_SET:
        assign(r, n->named, jj_eval(r, n->a));
        return FLOW_NEXT;
    case N_SET_ATTR:
        set_attribute(r, n);
        return FLOW_NEXT;
    case N_SET_BLOCK:
    case N_FILTER_BLOCK:
        return exec_block(r, n);
    case N_MACRO:
        define_macro(r, n);
        return FLOW_NEXT;
    case N_WITH:
        return exec_with(r, n);
    case N_BREAK:
        return FLOW_BREAK;
    case N_CONTINUE:
        return FLOW_CONTINUE;
    default:
        jj_fail(&r->job, ST_INTERNAL, "node %d is no statement", (int)n->kind);
    }
}

static enum flow exec_list(struct jj_render *r, const struct jj_node *list)
{
    enum flow flow = FLOW_NEXT;
    jj_enter(&r->job);
    for (const struct jj_node *n = list; n && flow == FLOW_NEXT; n = n->next) {
        jj_step(&r->job, 1);
        flow = exec_one(r, n);
    }
    r->job.depth--;
    return flow;
}

void jj_exec(struct jj_render *r, const struct jj_node *list)
{
    (void)exec_list(r, list);
}
