// lora_kernels_native::gather_lora_embed_{fwd,add,bwd} on the CPU. As gather.cpp, but s is no
// product: it is read from the pages, a [P, V, 16].
#include <algorithm>
#include <cstring>

#include "bindings/gather_call.h"

namespace lora_kernels {
namespace {

// ids of either width as int64, of any stride, each in [0, vocabulary).
std::vector<int64_t> ids_of(const Tensor& any, int64_t vocabulary) {
  check_shape("ids", any, {-1});
  const Tensor ids = torch::stable::contiguous(any);
  const bool narrow = ids.scalar_type() == ScalarType::Int;
  check_cpu("ids", ids, narrow ? ScalarType::Int : ScalarType::Long, {-1});
  std::vector<int64_t> found(size_t(ids.size(0)));
  for (size_t t = 0; t < found.size(); ++t) {
    found[t] = narrow ? data<int32_t>(ids)[t] : data<int64_t>(ids)[t];
    check_range("ids", found[t], "", int64_t(t), 0, vocabulary);
  }
  return found;
}

const std::vector<Tensor>& one_projection(const std::vector<Tensor>& pages) {
  LK_CHECK(pages.size() == size_t(kPageFields), "pages: got ", pages.size(),
           " tensors, expected 5");
  check_shape("pages.table", pages[2], {-1, -1});
  return pages;
}

// The checked arguments of a call. Each token is an entry.
struct EmbeddingCall : GatherCall {
  Projection p;
  std::vector<int64_t> ids;

  // `rows` is the weight, out or dy; the pages where there is none of these.
  EmbeddingCall(const char* name, const Tensor& rows, const Tensor& ids_given,
                const std::vector<Tensor>& pages, const Tensor& slots)
      : GatherCall(name, rows, ids_given.numel(), {torch::stable::contiguous(slots)},
                   pages[2].size(0)),
        p(projection_of("pages", pages.data(), {-1, -1, kPage}, entries)),
        ids(ids_of(ids_given, p.a->size(1))) {}

  // The offset in a [P, V, 16] of the 16 ranks of a token's id, in a page of its slot.
  int64_t at(const SlotGroup& g, int64_t entry, int64_t page) const {
    return (g.pages[page] * p.a->size(1) + ids[size_t(entry)]) * kPage;
  }

  // s[e, j] = a[page, id, j % 16]; ranks past the adapter's are not read.
  Tensor read_sums() const {
    std::vector<const SlotGroup*> of(size_t(entries.count));
    for (const SlotGroup& g : p.groups)
      for (int64_t i = 0; i < g.count; ++i) of[size_t(g.entries[i])] = &g;
    const Tensor sums = new_sums(p);
    float* to = mutable_data<float>(sums);
    with_type(p.dtype, [&](auto type) {
      const auto* from = data<decltype(type)>(*p.a);
      parallel(0, entries.count, 64, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
          const SlotGroup& g = *of[size_t(e)];
          for (int64_t j = 0; j < g.rank; ++j)
            to[e * p.width + j] = to_float(from[at(g, e, j / kPage) + j % kPage]);
        }
      });
    });
    return sums;
  }

  // Adds the LoRA branch to `out`, or writes it there.
  void branch(bool overwrite, const MatrixView& out) const {
    if (p.used || overwrite)
      expand(p, *p.b, SlotDropout{}, read_sums(), p.factor.data(), overwrite, out);
  }

  // da[page, id] = Σ u over the tokens of a slot with that id, in their order and rounded once.
  void scatter(const Tensor& u, const Tensor& da) const {
    struct Row {
      const SlotGroup* group;
      const int32_t *begin, *end;  // of `order`
    };
    std::vector<int32_t> order;
    order.reserve(size_t(entries.count));
    std::vector<Row> rows;
    for (const SlotGroup& g : p.groups) {
      if (g.rank == 0) continue;
      const int32_t *first = order.data() + order.size(), *end = first + g.count;
      order.insert(order.end(), g.entries, g.entries + g.count);
      std::stable_sort(order.end() - g.count, order.end(),
                       [&](int32_t a, int32_t b) { return ids[size_t(a)] < ids[size_t(b)]; });
      while (first < end) {
        const int32_t* next = first;
        while (next < end && ids[size_t(*next)] == ids[size_t(*first)]) ++next;
        rows.push_back({&g, first, next});
        first = next;
      }
    }
    with_type(p.dtype, [&](auto type) {
      auto* to = mutable_data<decltype(type)>(da);
      parallel(0, int64_t(rows.size()), 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Row& row = rows[size_t(i)];
          for (int64_t c = 0; c * kPage < row.group->rank; ++c)
            add_page(*row.group, c, row.begin, row.end, data<float>(u), to);
        }
      });
    });
  }

 private:
  template <class P>
  void add_page(const SlotGroup& g, int64_t page, const int32_t* begin, const int32_t* end,
                const float* u, P* to) const {
    float sum[kPage] = {};
    const int64_t ranks = std::min(kPage, g.rank - page * kPage);
    for (const int32_t* e = begin; e < end; ++e)
      for (int64_t j = 0; j < ranks; ++j) sum[j] += u[*e * p.width + page * kPage + j];
    P* row = to + at(g, *begin, page);
    for (int64_t j = 0; j < ranks; ++j) store(row + j, sum[j]);
  }
};

// y = the weight's rows, bit for bit; W may have any strides.
void copy_rows(const Tensor& weight, const EmbeddingCall& call, const Tensor& y) {
  const int64_t width = y.size(1), size = weight.element_size();
  const int64_t stride = weight.stride(0) * size, step = weight.stride(1) * size;
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  call.parallel(0, y.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* row = from + call.ids[size_t(t)] * stride;
      char* out = to + t * width * size;
      if (step == size)
        std::memcpy(out, row, size_t(width * size));
      else
        for (int64_t c = 0; c < width; ++c)
          std::memcpy(out + c * size, row + c * step, size_t(size));
    }
  });
}

Tensor gather_lora_embed_fwd(const Tensor& ids, const std::optional<Tensor>& weight,
                             const std::vector<Tensor>& pages, const Tensor& slots) {
  const Tensor& a = one_projection(pages)[0];
  const EmbeddingCall call(weight.has_value() ? "weight" : "pages.a", weight.value_or(a), ids,
                           pages, slots);
  if (weight.has_value()) {
    check_shape("weight", *weight, {a.size(1), call.p.n});
    LK_CHECK(weight->is_cpu(), "weight: is not on the CPU");
  }
  Tensor y = new_tensor(call.like, {call.entries.count, call.p.n}, call.like.scalar_type());
  if (weight.has_value()) copy_rows(*weight, call, y);
  call.branch(!weight.has_value(), matrix_view("y", y, -1, -1));
  return y;
}

void gather_lora_embed_add(const Tensor& out, const Tensor& ids, const std::vector<Tensor>& pages,
                           const Tensor& slots) {
  const EmbeddingCall call("out", out, ids, one_projection(pages), slots);
  call.branch(false, matrix_view("out", out, call.entries.count, call.p.n));
}

std::tuple<Tensor, Tensor, Tensor> gather_lora_embed_bwd(const Tensor& any_dy, const Tensor& ids,
                                                         const std::vector<Tensor>& pages,
                                                         const Tensor& slots,
                                                         const std::vector<bool>& needs) {
  const EmbeddingCall call("dy", any_dy, ids, one_projection(pages), slots);
  LK_CHECK(needs.size() == 3, "needs: got ", needs.size(), " flags, expected 3");
  const Projection& p = call.p;
  const Tensor dy = rows_of("dy", any_dy, p.n);
  const MatrixView view = matrix_view("dy", dy, call.entries.count, p.n);
  const bool want_a = needs[0], want_b = needs[1], want_scales = needs[2];
  if (want_a || want_b) check_unshared(p);
  Tensor da = want_a ? zeros_like(*p.a) : call.none(p.a->scalar_type());
  Tensor db = want_b ? zeros_like(*p.b) : call.none(p.b->scalar_type());
  Tensor dscales = want_scales ? zeros(dy, {call.entries.slots}, ScalarType::Float)
                               : call.none(ScalarType::Float);
  const Tensor u = call.new_sums(p);
  if (want_a || want_scales) call.shrink(p, *p.b, SlotDropout{}, view, u);
  if (want_b || want_scales) {
    const Tensor s = call.read_sums();
    if (want_scales)
      product_grads(call, p, data<float>(u), data<float>(s), mutable_data<float>(dscales), nullptr);
    if (want_b) {
      scale_rows(p, mutable_data<float>(s));
      call.wgrad(p, db, SlotDropout{}, view, s);
    }
  }
  if (want_a) {
    scale_rows(p, mutable_data<float>(u));
    call.scatter(u, da);
  }
  return {da, db, dscales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("gather_lora_embed_fwd", TORCH_BOX(&gather_lora_embed_fwd));
  m.impl("gather_lora_embed_add", TORCH_BOX(&gather_lora_embed_add));
  m.impl("gather_lora_embed_bwd", TORCH_BOX(&gather_lora_embed_bwd));
}

}  // namespace lora_kernels
